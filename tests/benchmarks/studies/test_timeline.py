"""The tables of a timeline: what lies inside what, and that no time is counted twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.studies.timeline import parts_of, tables
from rollout_server.engine.timeline import Timeline


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_own_times_add_up_and_waiting_for_work_is_nobodys(tmp_path: Path) -> None:
    path, clock = tmp_path / "trace.json", Clock()
    with Timeline(str(path), clock) as timeline:
        for read in (30, 0, 0):
            with timeline.turn():
                with timeline.part("take"), timeline.part("idle"):
                    clock.now += 5
                if read:
                    with timeline.part("prefill"), timeline.part("read") as part:
                        part.note(tokens=read, prompts=1)
                        clock.now += 3
                with timeline.part("step") as part:
                    part.note(rows=4)
                    clock.now += 0.5
                    with timeline.part("settle") as settle:
                        settle.note(rows=4)
                        clock.now += 1.5
        text = path.read_text("utf-8")
    parts = parts_of(text)  # The file was still open, without its end.
    assert [part.name for part in parts] == ["turn"] * 3
    assert [[inner.name for inner in part.inside] for part in parts[:2]] == [
        ["take", "prefill", "step"],
        ["take", "step"],
    ]
    assert sum(part.own for whole in parts for part in whole.all()) == pytest.approx(1e6 * clock.now)
    lines = [line.split() for line in tables(parts)]
    assert ["read,", "step", "1", "5.000", "5000.00", "30", "4"] in lines
    assert ["step", "2", "4.000", "2000.00", "0", "8"] in lines
    assert ["settle", "3", "4.500", "1500.000"] in lines
