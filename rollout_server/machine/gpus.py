"""Which GPUs there are to be shared out, a GPU to each process; without MLX, which would take one."""

from __future__ import annotations

from pathlib import Path

from rollout_server.errors import InvalidField

NVIDIA = Path("/proc/driver/nvidia/gpus")
"""NVIDIA's driver has a folder there for each GPU."""


def gpus_for(count: int, visible: tuple[str, ...] | None, found: Path = NVIDIA) -> tuple[str, ...]:
    """The name of a GPU for each of so many processes, as `CUDA_VISIBLE_DEVICES` takes it. `visible` are those that may
    be used, None for all. Raises `InvalidField` where there are too few."""
    names = visible if visible is not None else tuple(map(str, range(len(list(found.glob("*"))))))
    if len(names) < count:
        raise InvalidField(
            f"{count} engines or ranks of engines are asked for (--replicas, --tensor-parallel), each with a GPU to "
            f"itself, and there are {len(names)} GPUs: ask for at most as many.",
            param="replicas",
        )
    return names[:count]
