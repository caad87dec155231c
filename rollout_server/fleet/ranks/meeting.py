"""How ranks that `mlx.launch` started on several machines find rank 0: by way of the group that MLX made of them."""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import time
from typing import Any

import mlx.core as mx
import numpy as np

from rollout_server.errors import EngineUnavailable
from rollout_server.fleet.ranks.team import START_S, Member

LONGEST = 512
"""Bytes of what rank 0 says of itself."""
KEY_BYTES = 32
CONNECTIONS = 2
"""One for decisions and one for commands, from each rank."""


def await_ranks(group: Any, address: str, begin: bytes) -> list[Member]:
    """Rank 0's side, at an address that the others reach; each is told how to `begin`. Raises `EngineUnavailable` where
    not all of them come."""
    key = secrets.token_bytes(KEY_BYTES)
    links: dict[tuple[int, int], socket.socket] = {}
    with socket.create_server((address, 0)) as server:
        _shared(group, json.dumps({"address": address, "port": server.getsockname()[1], "key": key.hex()}))
        until = time.monotonic() + START_S
        while len(links) < CONNECTIONS * (group.size() - 1):
            server.settimeout(max(0.0, until - time.monotonic()))
            try:
                link, _ = server.accept()
                link.settimeout(START_S)
                said = link.recv(KEY_BYTES + 2, socket.MSG_WAITALL)
            except TimeoutError:
                raise EngineUnavailable(f"Not all of {group.size()} ranks came to {address}.") from None
            if len(said) < KEY_BYTES + 2 or not hmac.compare_digest(said[:KEY_BYTES], key):
                link.close()  # Who was not told the key by the group is no rank of it.
                continue
            link.settimeout(None)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            links[said[KEY_BYTES], said[KEY_BYTES + 1]] = link
    members = [Member(rank, links[rank, 0], links[rank, 1]) for rank in range(1, group.size())]
    for member in members:
        member.commands.sendall(begin)
    return members


def find_lead(group: Any) -> tuple[socket.socket, socket.socket]:
    """Another rank's side: its connections for decisions and for commands."""
    told = json.loads(_shared(group, ""))
    found = []
    for which in range(CONNECTIONS):
        link = socket.create_connection((told["address"], told["port"]), START_S)
        link.sendall(bytes.fromhex(told["key"]) + bytes([group.rank(), which]))
        link.settimeout(None)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        found.append(link)
    return found[0], found[1]


def _shared(group: Any, text: str) -> str:
    """What rank 0 says, on every rank."""
    values = np.zeros(LONGEST, np.int32)
    values[: len(text)] = list(text.encode()) if group.rank() == 0 else 0
    heard = np.array(mx.distributed.all_sum(mx.array(values), group=group))
    return bytes(heard[heard > 0].astype(np.uint8)).decode()
