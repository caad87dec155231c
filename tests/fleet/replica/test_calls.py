"""Calls one after another, which hold up no process that ends."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import CancelledError

import pytest

from rollout_server.fleet.replica.calls import CallsInOrder

HANGS = """
import threading
from rollout_server.fleet.replica.calls import CallsInOrder
calls, begun = CallsInOrder("test"), threading.Event()
calls.submit(lambda: (begun.set(), threading.Event().wait()))
begun.wait()
calls.stop()
print("over")
"""


def test_they_are_called_in_their_order_and_told_apart() -> None:
    calls, seen = CallsInOrder("test"), list[int]()

    def call(number: int, *, fails: bool = False) -> int:
        seen.append(number)
        if fails:
            raise ValueError(number)
        return number

    found = [calls.submit(call, number, fails=number == 3) for number in range(6)]
    assert [future.result(60) for future in found if future is not found[3]] == [0, 1, 2, 4, 5]
    with pytest.raises(ValueError, match="3"):
        found[3].result(60)
    assert seen == [0, 1, 2, 3, 4, 5]
    calls.stop()


def test_what_has_not_begun_when_they_stop_is_cancelled() -> None:
    calls, begun, go_on = CallsInOrder("test"), threading.Event(), threading.Event()
    first = calls.submit(lambda: (begun.set(), go_on.wait(60)))
    second = calls.submit(begun.clear)
    assert begun.wait(60)
    calls.stop()
    go_on.set()
    assert first.result(60) == (None, True)
    with pytest.raises(CancelledError):
        second.result(60)
    assert begun.is_set()


def test_a_process_ends_although_one_hangs() -> None:
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "over\n"), done.stderr
