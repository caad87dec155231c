"""The study of a GPU: figures are kept whatever happens, parts are chosen, and it runs on a small model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.studies.gpu import __main__ as gpu
from benchmarks.studies.gpu.figures import Figure, Report, in_turns, over


@pytest.mark.parametrize(
    ("asked", "at_most", "verdict"),
    [(3.0, False, "met"), (3.1, False, "MISSED"), (3.0, True, "met"), (None, False, "")],
)
def test_a_figure_is_told_beside_what_is_asked(asked: float | None, at_most: bool, verdict: str) -> None:
    line = Figure("a step", "ms", (2.0, 3.0, 5.0), asked, at_most).line()
    assert line.startswith("a step: 3 ms (2 to 5)")
    assert line.endswith(verdict) and ("asked" in line) is (asked is not None)


def test_a_part_that_fails_keeps_its_figures_and_lets_the_next_one_run(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    report = Report(path, {"command": "this"})

    def breaks() -> Iterator[Figure]:
        yield Figure("one", "ms", (1.0,))
        assert [f["name"] for f in json.loads(path.read_text())["parts"]["first"]["figures"]] == ["one"]
        raise ValueError("the device is on fire")

    report.measure("first", "Does it break?", breaks)
    report.measure("second", "Does it run?", lambda: [Figure("two", "ms", (2.0,), 1.0, at_most=True)])
    found = json.loads(path.read_text("utf-8"))
    assert report.failed == ["first"] and found["command"] == "this"
    assert found["parts"]["first"]["error"] == "ValueError: the device is on fire"
    assert [f["name"] for f in found["parts"]["first"]["figures"]] == ["one"]
    assert found["parts"]["second"]["figures"][0]["met"] is False


def test_calls_take_turns_after_one_to_warm_up() -> None:
    told: list[str] = []

    def call(name: str) -> float:
        told.append(name)
        return float(len(told))

    found = in_turns({"a": lambda: call("a"), "b": lambda: call("b")}, 2)
    assert told == ["a", "b"] * 3
    assert found == {"a": (3.0, 5.0), "b": (4.0, 6.0)}
    assert over(found["a"], found["b"]) == (0.75, 5.0 / 6.0)


@pytest.mark.long
def test_a_part_runs_on_a_small_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "top-p", "--shape", "tiny", "--rounds", "1", "--out", str(tmp_path)])
    assert gpu.main() == 0
    part = json.loads((tmp_path / "gpu.json").read_text("utf-8"))["parts"]["top-p"]
    assert [figure["unit"] for figure in part["figures"]] == ["tok/s", "tok/s", ""]


def test_an_unknown_part_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "nothing", "--shape", "tiny"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "no part is called nothing" in capsys.readouterr().err
