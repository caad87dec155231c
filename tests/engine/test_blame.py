"""What a failure belongs to."""

from __future__ import annotations

import pytest

from rollout_server.engine.blame import Blame


def test_whatever_was_being_done_is_to_blame_the_outermost_first() -> None:
    blame = Blame()
    with pytest.raises(ValueError), blame("push"):
        with blame((0, 0)):
            pass
        with blame((1, 0)), blame("row"):
            raise ValueError
    assert list(blame) == ["push", (1, 0), "row"]
    assert blame.of(str) == ["push", "row"] and blame.of(tuple) == [(1, 0)] and blame.of(int) == []
    blame.clear()
    assert list(blame) == []


def test_nothing_is_to_blame_for_what_was_dealt_with_inside() -> None:
    blame = Blame()
    with blame("push"):
        try:
            with blame((0, 0)):
                raise ValueError
        except ValueError:
            pass
    assert list(blame) == []


def test_a_part_may_be_left_in_its_middle() -> None:
    blame = Blame()

    def left() -> int:
        with blame("push"):
            return 1

    assert left() == 1 and list(blame) == []
