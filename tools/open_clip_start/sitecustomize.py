"""Start-up file of the environment that tests the open_clip adapter: put its folder on PYTHONPATH.

torchvision's compiled operators load beside the torch build that they were made for. Where they do not (a CPU-only
torch), importing torchvision fails on two operators that torch has never heard of. Naming those two is enough: nothing
that the adapter uses calls them.
"""

import importlib.util
from pathlib import Path

_kept = []  # an operator library is gone when its object is


def _name_missing_operators() -> None:
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return
    import torch

    try:
        torch.ops.load_library(str(Path(found.origin).with_name("_C.so")))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)


_name_missing_operators()
