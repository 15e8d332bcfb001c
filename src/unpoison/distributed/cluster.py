"""Connecting to a Ray cluster, or starting one on this machine."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from unpoison.errors import MissingExtraError, UsageError

LOCAL = "local"
CLIENT = "ray://"
_CONNECT = 5.0
_COLORS = re.compile(r"\x1b\[[0-9;]*m")


@contextmanager
def cluster(address: str, processors: int | None = None) -> Iterator[Any]:
    """The ray module, connected. Raises MissingExtraError, UsageError."""
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("--ray", "ray") from error
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address == LOCAL:
        ray.init(address=LOCAL, num_cpus=processors, include_dashboard=False, **quiet)  # none that runs already
    else:
        check_answers(address)
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            raise no_answer(address, reason_of(error)) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def pool_size(ray: Any) -> tuple[int, bool]:
    """How many workers the connected cluster holds, and whether each has a GPU: one for each GPU, else for each core.

    Raises UsageError for a cluster without cores.
    """
    gpus, cores = (int(ray.cluster_resources().get(name, 0)) for name in ("GPU", "CPU"))
    if not cores:
        raise UsageError("the Ray cluster has no core to spare.", hint="Add a node with --num-cpus of at least 1.")
    return gpus or cores, bool(gpus)


def count_workers(address: str) -> int:
    """:func:`pool_size` of the cluster at ``address``; for "local" nothing is started."""
    if address == LOCAL:
        return torch.cuda.device_count() or os.cpu_count() or 1
    with cluster(address) as ray:
        return pool_size(ray)[0]


def check_answers(address: str) -> None:
    """Raises UsageError where nothing listens at HOST:PORT and for an address of Ray's client; "auto" is left to Ray,
    "local" needs none."""
    if address in ("auto", LOCAL):
        return
    if address.startswith(CLIENT):
        raise UsageError(
            f"--ray {address}: Ray's client is not used here.",
            hint="On a machine of the cluster give HOST:PORT as `ray start` said it (mostly port 6379), or 'auto'; "
            "from elsewhere send the whole command there: ray job submit --address http://HOST:8265 -- unpoison ...",
        )
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or not host:
        raise UsageError(
            f"--ray {address}: expected HOST:PORT, 'auto' or 'local'.",
            hint="For example 10.0.0.1:6379; --ray alone, last or before another option, starts one on this machine.",
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT).close()
    except (OSError, OverflowError) as error:
        raise no_answer(address, str(error)) from error


def no_answer(address: str, why: str) -> UsageError:
    return UsageError(
        f"no Ray cluster answers at {address} ({why}).",
        hint="Start one with `ray start --head`, or run on this machine: --ray alone.",
    )


def reason_of(error: BaseException) -> str:
    """The error behind Ray's, in one line: Ray quotes whole tracebacks, in color, and adds advice."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception) and not type(cause).__module__.startswith("ray."):
        return f"{type(cause).__name__}: {cause}".strip().splitlines()[0].rstrip(".")
    lines = [line.strip() for line in _COLORS.sub("", str(error)).strip().splitlines()]
    named = [line for line in lines if re.match(r"(?!ray\.)[\w.]+(Error|Exception): ", line)]
    return (named[-1] if named else next(iter(lines), "") or type(error).__name__).rstrip(".")


__all__ = ["LOCAL", "check_answers", "cluster", "count_workers", "pool_size", "reason_of"]
