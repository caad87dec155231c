"""Rank 0 finds out what has become of the others, and says it once."""

from __future__ import annotations

import queue
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from rollout_server.engine.messages.control import Ping
from rollout_server.engine.messages.options import RankOptions
from rollout_server.engine.ranks.digest import TurnDigest
from rollout_server.errors import EngineUnavailable
from rollout_server.fleet.codec.frames import next_frame
from rollout_server.fleet.ranks.decisions import DECISION, OTHER, SAME, Teller
from rollout_server.fleet.ranks.team import ALIVE, FAILED, LONG_TURN, WATCH_S, Member, Team, ending
from rollout_server.fleet.ranks.words import rank_codec, uncompiled
from tests.support.live_server import until


@dataclass
class Watched:
    """A team with one other rank, which the test plays."""

    team: Team
    decisions: socket.socket
    commands: socket.socket
    messages: queue.SimpleQueue[Any]
    fell: list[str] = field(default_factory=list)

    def why(self) -> str:
        until(lambda: self.fell)
        assert len(self.fell) == 1 and self.team.fault == self.fell[0]
        return self.fell[0]


def watched(
    process: subprocess.Popen[bytes] | None = None,
    silent_s: float = 60.0,
    load_s: float = 60.0,
    teller: Teller | None = None,
) -> Watched:
    """With a `teller`, turns have begun before anybody watches."""
    near, far = zip(*(socket.socketpair() for _ in range(2)), strict=True)
    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
    fell: list[str] = []
    team = Team(
        [Member(1, near[0], near[1], process)],
        rank_codec(uncompiled),
        messages,
        RankOptions(2, silent_s=silent_s, load_s=load_s),
        fell.append,
    )
    if teller is not None:
        team.lead(teller)
    team.start()
    return Watched(team, far[0], far[1], messages, fell)


@pytest.fixture
def other() -> Iterator[Watched]:
    found = watched()
    yield found
    found.team.close()


def test_a_command_is_sent_to_every_rank(other: Watched) -> None:
    other.messages.put(Ping("here"))
    frame = next_frame(other.commands.recv_into)
    assert frame is not None and rank_codec(uncompiled).decode(*frame) == Ping("here")


def test_a_rank_that_ends_is_told_of_with_its_status() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    other = watched(process)
    process.kill()
    process.wait()
    other.commands.close()
    assert "Rank 1 has ended (exit status -9)" in other.why()


def test_a_rank_that_says_what_went_wrong_is_quoted(other: Watched) -> None:
    other.commands.sendall(ALIVE + b"\n" + FAILED + b"the model is not there\n")
    assert "Rank 1: the model is not there" in other.why()


def test_a_rank_that_did_something_else_ends_the_engine(other: Watched) -> None:
    other.decisions.sendall(DECISION.pack(SAME, b"") * 2 + DECISION.pack(OTHER, b""))
    assert "Before turn 3 rank 1 did something else than rank 0" in other.why()


def test_a_rank_that_says_nothing_ends_the_engine_in_time() -> None:
    other, began = watched(silent_s=1.0), time.monotonic()
    other.commands.sendall(ALIVE + b"\n")
    assert "Rank 1 was not heard of for 1 s" in other.why()
    assert time.monotonic() - began >= 1.0


def test_a_turn_that_never_ends_ends_the_engine_though_all_look_alive(other: Watched) -> None:
    teller = Teller([], TurnDigest())
    teller.clock()
    assert teller.told_at is not None
    other.team.lead(teller)
    other.commands.sendall(ALIVE + b"\n")
    # The rank was heard of just now, and the turn began long ago.
    teller.told_at -= LONG_TURN * 60.0
    assert f"No rank has got any further for {LONG_TURN * 60} s" in other.why()


def test_ranks_that_never_finish_loading_end_the_engine_though_all_look_alive() -> None:
    """One that fails says so; one that waits for a sum which another does not join says nothing."""
    began = time.monotonic()
    other = watched(load_s=1.0)
    other.commands.sendall(ALIVE + b"\n")
    assert "2 ranks have not loaded the model and tried it together within 1 s" in other.why()
    assert time.monotonic() - began >= 1.0


def test_a_model_that_is_loaded_may_serve_for_longer_than_it_may_load() -> None:
    # Whoever looks finds it loaded, and the time for loading over.
    other = watched(load_s=0.0, teller=Teller([], TurnDigest()))
    time.sleep(3 * WATCH_S)
    other.team.close()
    assert other.fell == []


def test_an_engine_that_was_told_to_end_misses_nobody(other: Watched) -> None:
    other.team.close()
    other.commands.close()
    other.decisions.close()
    time.sleep(0.5)
    assert other.fell == [] and other.team.fault is None


def test_ranks_that_rank_0_does_not_meet_are_ended() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    near, far = zip(*(socket.socketpair() for _ in range(2)), strict=True)
    with far[0], far[1]:
        with pytest.raises(EngineUnavailable, match="did not meet"), ending([Member(1, near[0], near[1], process)]):
            raise EngineUnavailable("The ranks did not meet.")
        assert process.poll() is not None and far[1].recv(1) == b""
