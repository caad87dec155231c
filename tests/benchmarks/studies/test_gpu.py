"""The study of a GPU: figures are kept whatever happens, parts are chosen, and it runs on a small model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.studies.gpu import __main__ as gpu
from benchmarks.studies.gpu.decoding import cells, room_beside, step_at
from benchmarks.studies.gpu.figures import Figure, Report, in_turns, over
from benchmarks.studies.gpu.held import Held
from benchmarks.studies.gpu.shapes import SIZES

UNITS = {
    "decode": ["tok/s", "tok/s", "tok/s", ""] * 2,
    "adapters": ["tok/s"] * 4 + [""] * 3,
    "host": ["µs"] * 4,
    "top-p": ["tok/s", "tok/s", ""],
    "widths": ["ms", ""] * 4,
    "bandwidth": ["ms", ""],
    "latency": [""] * 8,
}
"""Of the figures of parts that need no GPU, no other server and no peer."""


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
@pytest.mark.parametrize("part", UNITS)
def test_a_part_runs_on_a_small_model(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", part, "--shape", "tiny", "--rounds", "1", "--out", str(tmp_path)])
    assert gpu.main() == 0
    found = json.loads((tmp_path / "gpu.json").read_text("utf-8"))["parts"]
    assert [figure["unit"] for figure in found[part]["figures"]] == UNITS[part]


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Held]:
    folder = tmp_path_factory.mktemp("held")
    with Held(SIZES["tiny"], 1, folder, folder, trace=False) as held:
        yield held


def test_an_engine_that_has_too_little_kv_memory_is_started_with_more(held: Held) -> None:
    size = held.size
    little = held.start(size.many, "tiny", 2**20)
    info = little.handle.info
    needed = cells(size.rows, 48 - size.steps // 2, size.steps) * info.kv_bytes_per_token
    assert needed > info.kv_memory == 2**20
    names = [figure.name for figure in step_at(held, "tiny", size.rows, 48)]
    assert len(names) == 2 and not any("not run" in name for name in names)
    roomy = held.engine(size.many)
    assert roomy is not little and roomy.handle.info.kv_memory == needed
    assert held.engine(size.many, kv_memory=needed) is roomy


def test_what_the_device_cannot_hold_is_not_run_and_says_why(held: Held) -> None:
    (figure,) = step_at(held, "tiny", 32, 10**9)
    assert figure.name.startswith("tiny, 32 rows × 1000000000 columns: not run, its KV takes ")
    assert " GiB and the device has " in figure.name and figure.unit == "needed / there" and figure.value > 1


def test_an_h200_runs_every_width_but_one() -> None:
    size = SIZES["0.6B"]
    # Parameters in bfloat16; 28 layers, keys and values, 8 heads of 128 numbers, bfloat16.
    there, kv_token = room_beside(2 * 596_000_000, 139 * 2**30), 28 * 2 * 8 * 128 * 2
    not_run = [
        (rows, columns)
        for rows in (size.rows, size.many)
        for columns in size.columns
        if cells(rows, columns - size.steps // 2, size.steps) * kv_token > there
    ]
    assert not_run == [(512, 4096)]


def test_an_unknown_part_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "nothing", "--shape", "tiny"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "no part is called nothing" in capsys.readouterr().err
