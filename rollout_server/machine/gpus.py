"""Which GPUs there are to be shared out, a GPU to each process; without MLX, which would take one."""

from __future__ import annotations

from pathlib import Path

from rollout_server.errors import InvalidField
from rollout_server.machine.blas import cuda_build

NVIDIA = Path("/proc/driver/nvidia/gpus")
"""NVIDIA's driver has a folder there for each GPU."""


def gpus_for(count: int, visible: tuple[str, ...] | None, found: Path = NVIDIA) -> tuple[str, ...]:
    """The name of a GPU for each of so many processes, as `CUDA_VISIBLE_DEVICES` takes it; empty where MLX computes on
    no CUDA device, so that processes share what there is. `visible` are those that may be used, None for all.

    Raises `InvalidField` where there are too few."""
    if cuda_build() is None:
        return ()
    names = visible if visible is not None else tuple(map(str, range(len(list(found.glob("*"))))))
    if len(names) < count:
        raise InvalidField(
            f"--replicas asks for {count} engines, each with a GPU to itself, and there are {len(names)} GPUs: ask for "
            "at most as many.",
            param="replicas",
        )
    return names[:count]
