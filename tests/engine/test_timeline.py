"""The timeline of turns: what is written, what is left out, and that the engine never ends with it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from rollout_server.engine.timeline import LEAST_S, Timeline, Unseen
from rollout_server.errors import InvalidField


class Clock:
    """Moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def events(path: Path) -> list[dict[str, Any]]:
    return [event for event in json.loads(path.read_text("utf-8")) if event["ph"] == "X"]


def test_parts_lie_inside_their_turn_at_the_times_of_the_clock(tmp_path: Path) -> None:
    path, clock = tmp_path / "trace.json", Clock()
    with Timeline(str(path), clock) as timeline:
        clock.now += 1
        with timeline.turn():
            with timeline.part("step") as step:
                step.note(rows=3)
                with timeline.part("settle"):
                    clock.now += 0.5
            clock.now += 0.25
    settle, step, turn = events(path)
    assert [event["name"] for event in (settle, step, turn)] == ["settle", "step", "turn"]
    assert (settle["ts"], settle["dur"]) == (step["ts"], step["dur"]) == (1e6, 0.5e6)
    assert (turn["ts"], turn["dur"]) == (1e6, 0.75e6)
    assert step["args"] == {"rows": 3} and turn["args"] == {"turn": 1}


def test_a_turn_that_did_nothing_is_left_out(tmp_path: Path) -> None:
    path, clock = tmp_path / "trace.json", Clock()
    with Timeline(str(path), clock) as timeline:
        for _ in range(3):
            with timeline.turn(), timeline.part("idle"):
                clock.now += 1
        with timeline.turn():
            with timeline.part("admit"):
                clock.now += LEAST_S / 2
            with timeline.part("read") as read:
                read.note(tokens=7)
    assert [event["name"] for event in events(path)] == ["read", "turn"]
    assert events(path)[-1]["args"] == {"turn": 4}


def test_what_raises_in_a_part_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with Timeline(str(path)) as timeline, timeline.turn() as turn:
        with pytest.raises(ZeroDivisionError), timeline.part("step"):
            raise ZeroDivisionError
        turn.note(error="ZeroDivisionError")
    assert {event["args"]["error"] for event in events(path) if event["name"] == "turn"} == {"ZeroDivisionError"}


def test_pushes_that_overlap_stand_on_tracks_of_their_own(tmp_path: Path) -> None:
    path, clock = tmp_path / "trace.json", Clock()
    with Timeline(str(path), clock) as timeline:
        clock.now = 110.0
        for id, begin in (("a", 101.0), ("b", 105.0)):
            for done in (False, True):
                with timeline.turn(), timeline.part("change versions") as part:
                    part.note(policy=id)
                    clock.now += 1
                    timeline.push(
                        id, id, [("receive", begin, begin + 2), ("validate", begin + 2, begin + 3)], part, done=done
                    )
        with timeline.turn(), timeline.part("change versions") as part:
            part.note(policy="c")
            timeline.push("c", "c", [], part, done=True)
    pushed = [event for event in events(path) if event["name"] == "push"]
    assert [(push["args"]["policy"], push["ts"] / 1e6, push["dur"] / 1e6) for push in pushed] == [
        ("a", 1.0, 11.0),
        ("b", 5.0, 9.0),
        ("c", 14.0, 0.0),
    ]
    first, second, third = (push["tid"] for push in pushed)
    assert first == third != second
    staged = [event for event in events(path) if event["name"] == "stage and publish"]
    assert [(stage["ts"] / 1e6, stage["dur"] / 1e6) for stage in staged] == [(10.0, 2.0), (12.0, 2.0), (14.0, 0.0)]


def test_every_turn_is_in_the_file_as_soon_as_it_is_over(tmp_path: Path) -> None:
    """A process that is killed leaves an array without its end, which viewers open."""
    path = tmp_path / "trace.json"
    with Timeline(str(path)) as timeline:
        for number in range(3):
            with timeline.turn() as turn:
                turn.note(rows=number)
            written = json.loads(path.read_text("utf-8") + "]")
            assert [event["args"]["rows"] for event in written if event["ph"] == "X"] == list(range(number + 1))


def test_a_full_file_is_closed_and_recording_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "trace.json"
    with Timeline(str(path), most_bytes=4096) as timeline, caplog.at_level(logging.WARNING):
        for number in range(200):
            with timeline.turn() as turn:
                turn.note(rows=number)
        assert type(timeline.part("step")) is Unseen
    assert path.stat().st_size <= 4096 + len("\n]\n")
    found = [event["args"]["rows"] for event in events(path)]
    assert found == list(range(len(found))) and 10 < len(found) < 200
    assert len(caplog.messages) == 1 and "is full" in caplog.text


def test_a_file_that_takes_no_more_ends_recording_only(caplog: pytest.LogCaptureFixture) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no device that is always full")
    with Timeline(str(full)) as timeline, caplog.at_level(logging.WARNING):
        for _ in range(3):
            with timeline.turn() as turn:
                turn.note(rows=1)
        assert type(timeline.part("step")) is Unseen
    assert "could not be written" in caplog.text


def test_without_a_file_nothing_is_made() -> None:
    with Timeline() as timeline:
        assert timeline.turn() is timeline.part("step") is timeline.part("settle")
        with timeline.turn() as turn:
            turn.note(rows=1)
            timeline.push("a", "a", [], turn, done=True)


def test_a_file_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidField, match="cannot be written") as refused:
        Timeline(str(tmp_path / "nowhere" / "trace.json"))
    assert refused.value.param == "trace"
