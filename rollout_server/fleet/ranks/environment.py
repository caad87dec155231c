"""What MLX reads of the environment when ranks meet, and how the processes of one machine are told it."""

from __future__ import annotations

import json
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import IO

from rollout_server.engine.messages.options import EngineOptions, RankOptions

LOOPBACK = "127.0.0.1"
HOSTFILE = "/dev/stdin"
"""Where a rank of this machine finds the addresses of all: nothing is left behind, and there is no name to guess."""


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on now."""
    with ExitStack() as open_sockets:
        found = [open_sockets.enter_context(socket.socket()) for _ in range(count)]
        for each in found:
            each.bind((LOOPBACK, 0))
        return [each.getsockname()[1] for each in found]


def of_rank(rank: int, ranks: RankOptions) -> dict[str, str]:
    """What MLX is to read in one rank of this machine; the rest is the same for all, and inherited."""
    return {"MLX_RANK": str(rank)} | ({"CUDA_VISIBLE_DEVICES": ranks.devices[rank]} if ranks.devices else {})


def of_lead(ranks: RankOptions) -> dict[str, str]:
    """What it is to read in rank 0, from which the others inherit where they meet."""
    if ranks.backend == "nccl":
        [port] = free_ports(1)
        shared = {"MLX_WORLD_SIZE": str(ranks.size), "NCCL_HOST_IP": LOOPBACK, "NCCL_PORT": str(port)}
    else:
        shared = {"MLX_HOSTFILE": HOSTFILE}
    return of_rank(0, ranks) | shared


def hosts_of(size: int) -> str:
    """Addresses of so many ranks of this machine, as MLX's ring reads them."""
    return json.dumps([[f"{LOOPBACK}:{port}"] for port in free_ports(size)])


@contextmanager
def file_of(text: str) -> Iterator[IO[bytes]]:
    """A file without a name that can be read from its beginning."""
    with tempfile.TemporaryFile() as file:
        file.write(text.encode())
        file.seek(0)
        yield file


def placed(options: EngineOptions, devices: Sequence[str]) -> tuple[dict[str, str], EngineOptions]:
    """The variables of a replica's process and how its engine is run, with these GPUs, or with what all share."""
    ranks = options.ranks
    if ranks is None:
        return ({"CUDA_VISIBLE_DEVICES": devices[0]} if devices else {}), options
    if ranks.launched:
        return {}, options
    ranks = replace(ranks, devices=tuple(devices))
    # Without devices of their own, ranks share the memory of one.
    sharing = options.sharing * (1 if devices else ranks.size)
    return of_lead(ranks), replace(options, ranks=ranks, sharing=sharing)
