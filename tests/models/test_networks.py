"""The reference networks have the shapes that published checkpoints and our measurements rely on."""

import pytest
import torch

from unpoison.models.checkpoints import hash_weights
from unpoison.models.networks import ARCHITECTURES, build_network


@pytest.mark.parametrize(("name", "millions"), [("small-resnet", 0.31), ("preact-resnet-18", 11.17)])
def test_size_and_output(name: str, millions: float) -> None:
    network = build_network(name, 10, seed=0)
    assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6, 2) == millions
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert network(torch.rand(2, 3, 64, 64)).shape == (2, 10)


def test_preact_resnet_has_the_usual_keys() -> None:
    keys = build_network("preact-resnet-18", 10, seed=0).state_dict().keys()
    expected = {"conv1.weight", "layer1.0.bn1.weight", "layer2.0.shortcut.0.weight", "layer4.1.conv2.weight"}
    assert expected | {"linear.weight", "linear.bias"} <= keys
    assert "layer1.0.shortcut.0.weight" not in keys


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_seed_decides_and_the_global_state_stays(name: str) -> None:
    before = torch.random.get_rng_state()
    first, again, other = (hash_weights(build_network(name, 3, seed=seed).state_dict()) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.random.get_rng_state(), before)
