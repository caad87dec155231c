"""What rank 0 decides by, the others decide by: commands, clocks, and the digest at the end of each turn's commands."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Iterator

import pytest

from rollout_server.engine.messages.control import Ping, Resume
from rollout_server.engine.messages.rollouts import Command
from rollout_server.engine.ranks.digest import TurnDigest
from rollout_server.fleet.ranks.decisions import (
    DECISION,
    OTHER,
    SAME,
    FollowMailbox,
    LeadMailbox,
    Listener,
    OutOfStep,
    Teller,
)


class Two:
    """Rank 0 and another one, in one thread: a socket holds what was told until it is heard."""

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self.near = near
        self.digests = TurnDigest(), TurnDigest()
        self.teller, self.listener = Teller([near], self.digests[0]), Listener(far, self.digests[1])
        self.follow = FollowMailbox()
        self.follow.begin(self.listener)
        self.lead = LeadMailbox(self.follow.put)
        self.lead.begin(self.teller)

    def answer(self) -> bytes:
        kind: bytes = DECISION.unpack(self.near.recv(DECISION.size))[0]
        return kind


@pytest.fixture
def two() -> Iterator[Two]:
    near, far = socket.socketpair()
    with near, far:
        yield Two(near, far)


def take(mailbox: queue.SimpleQueue[Command]) -> list[Command]:
    """As a turn takes commands."""
    taken = []
    while True:
        try:
            taken.append(mailbox.get_nowait())
        except queue.Empty:
            return taken


def test_a_turn_takes_the_commands_that_rank_0_took(two: Two) -> None:
    """Also where more have come since."""
    two.lead.put(Ping("one"))
    two.lead.put(Resume("two"))
    assert take(two.lead) == [Ping("one"), Resume("two")]
    two.lead.put(Ping("late"))
    assert take(two.follow) == [Ping("one"), Resume("two")]
    assert take(two.lead) == take(two.follow) == [Ping("late")]
    assert (two.teller.turns, two.listener.turns) == (2, 2)


def test_commands_of_many_threads_are_taken_in_one_order(two: Two) -> None:
    def put(name: str) -> None:
        for number in range(25):
            two.lead.put(Ping(f"{name}{number}"))

    threads = [threading.Thread(target=put, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = take(two.lead)
    assert take(two.follow) == taken and len(taken) == 100


def test_one_clock_serves_all_ranks(two: Two) -> None:
    told = [two.teller.clock() for _ in range(3)]
    assert [two.listener.clock() for _ in range(3)] == told


def test_whether_commands_wait_is_told(two: Two) -> None:
    found = [two.lead.empty()]
    two.lead.put(Ping("here"))
    found.append(two.lead.empty())
    assert [two.follow.empty(), two.follow.empty()] == found == [True, False]


def test_a_rank_that_did_something_else_says_so_and_stops(two: Two) -> None:
    for digest in two.digests:
        digest.saw_ids([1, 2, 3])
    assert take(two.lead) == take(two.follow) == [] and two.answer() == SAME
    two.digests[0].saw_ids([1, 2, 3])
    two.digests[1].saw_ids([1, 2, 4])
    take(two.lead)
    with pytest.raises(OutOfStep, match="turn 2"):
        take(two.follow)
    assert two.answer() == OTHER


def test_a_rank_that_asks_for_something_else_stops(two: Two) -> None:
    two.teller.clock()
    with pytest.raises(OutOfStep, match="In turn 0"):
        two.follow.get_nowait()


def test_a_rank_ends_when_rank_0_is_gone(two: Two) -> None:
    two.near.close()
    with pytest.raises(EOFError):
        two.follow.get_nowait()
