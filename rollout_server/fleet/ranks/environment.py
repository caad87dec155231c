"""What MLX reads of the environment when ranks meet, and how the processes of one machine are told it."""

from __future__ import annotations

import json
import random
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO

from rollout_server.engine.messages.options import EngineOptions, RankOptions

LOOPBACK = "127.0.0.1"
HOSTFILE = "/dev/stdin"
"""Where a rank of this machine finds the addresses of all: nothing is left behind, and there is no name to guess."""

HANDED_OUT = Path("/proc/sys/net/ipv4/ip_local_port_range")
FIRST_PORT, TRIED = 10_000, 256
"""The lowest port that is taken, and how many are tried."""


def free_ports(count: int, handed_out: Path = HANDED_OUT) -> list[int]:
    """Ports of loopback that nobody listens on now. Ranks listen on them seconds later: where Linux says which ports it
    gives to whoever names none, they are lower ones, so that it does not give them away meanwhile."""
    with ExitStack() as open_sockets:
        found: list[int] = []
        for port in [*_named_by_nobody(handed_out), *[0] * count]:
            if len(found) == count:
                break
            each = open_sockets.enter_context(socket.socket())
            try:
                each.bind((LOOPBACK, port))
            except OSError:
                if not port:
                    raise
                continue  # Somebody has it.
            found.append(each.getsockname()[1])
        return found


def _named_by_nobody(handed_out: Path) -> list[int]:
    """Some ports below those that Linux hands out, by chance: other engines that start now look for theirs."""
    try:
        lowest = int(handed_out.read_text(encoding="utf-8").split()[0])
    except OSError:
        return []
    below = range(min(FIRST_PORT, lowest), lowest)
    return random.SystemRandom().sample(below, min(TRIED, len(below)))


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
