"""Two ranks that did the same have the same digest; log-probabilities and times do not count."""

from __future__ import annotations

from rollout_server.engine.messages.control import Pong
from rollout_server.engine.messages.status import EngineStatus
from rollout_server.engine.ranks.digest import SIZE, TurnDigest


def digest(*ids: int, steps: int = 0, pong: str = "") -> bytes:
    made = TurnDigest()
    made.saw_ids(ids)
    made.saw_events([Pong(pong)] if pong else [])
    made.saw_status(EngineStatus("ready", steps=steps))
    return made.take()


def test_equal_turns_have_equal_digests() -> None:
    assert digest(1, 2, steps=3, pong="p") == digest(1, 2, steps=3, pong="p") and len(digest()) == SIZE


def test_another_token_another_order_another_count_and_another_answer_show() -> None:
    told = {digest(1, 2), digest(2, 1), digest(1, 3), digest(1, 2, steps=1), digest(1, 2, pong="p"), digest(1)}
    assert len(told) == 6


def test_a_turn_begins_with_nothing() -> None:
    made, fresh = TurnDigest(), TurnDigest()
    made.saw_ids([5])
    made.take()
    assert made.take() == fresh.take()
