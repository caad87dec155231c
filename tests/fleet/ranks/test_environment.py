"""Ports that ranks listen on later are free, and stay so."""

from __future__ import annotations

import socket
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from rollout_server.fleet.ranks.environment import FIRST_PORT, HANDED_OUT, LOOPBACK, free_ports


def taken(port: int) -> socket.socket:
    """A socket that listens there. Raises `OSError`."""
    listening = socket.socket()
    listening.bind((LOOPBACK, port))
    listening.listen()
    return listening


def test_ports_are_free_and_each_another() -> None:
    ports = free_ports(64)
    assert len(set(ports)) == 64
    with ExitStack() as open_sockets:
        for port in ports:
            open_sockets.enter_context(taken(port))
        assert not set(free_ports(64)) & {*ports}


@pytest.mark.skipif(not HANDED_OUT.exists(), reason="this system does not say which ports it hands out")
def test_they_are_none_that_the_system_hands_out_meanwhile() -> None:
    lowest = int(HANDED_OUT.read_text().split()[0])
    if lowest < 2 * FIRST_PORT:
        pytest.skip("this system hands out nearly all ports")
    assert all(FIRST_PORT <= port < lowest for port in free_ports(64))


@pytest.mark.parametrize("said", ["1024 65535", f"{FIRST_PORT} 60999", f"{FIRST_PORT + 1} 60999", None])
def test_where_there_are_none_or_too_few_below_the_system_chooses(said: str | None, tmp_path: Path) -> None:
    place = tmp_path / "range"
    if said is not None:
        place.write_text(said)
    assert len(set(free_ports(4, place))) == 4


def test_one_that_somebody_listens_on_is_passed_over(tmp_path: Path) -> None:
    """Of two, the other is left, and one that the system chooses."""
    place = tmp_path / "range"
    place.write_text(f"{FIRST_PORT + 2} 60999")
    with ExitStack() as open_sockets:
        # Where that fails, somebody else listens on it.
        with suppress(OSError):
            open_sockets.enter_context(taken(FIRST_PORT))
        found = free_ports(2, place)
    assert len(set(found)) == 2 and FIRST_PORT not in found
