"""The report says what the results say: medians, verdicts, commands, and nothing of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.record import Curve, Measured, Ratio, Scale, Section, ratio, read, write

ABOUT = {
    "command": "python -m benchmarks decode --rounds 3",
    "commit": "0123456789",
    "when": "2026-01-02T03:04:05+00:00",
    "minutes": 1.5,
    "cores": 2,
    "processor": "A Processor",
    "memory_gib": 24.0,
    "system": "Linux",
    "python": "3.11.7",
    "versions": {"mlx": "0.32.4"},
    "blas": "OpenBLAS 0.3.21",
    "load_before": 0.1,
    "full": True,
    "rounds": 3,
}
ONE, OTHER = Measured("engine", "tok/s", (90.0, 80.0, 95.0)), Measured("bare", "tok/s", (100.0, 100.0, 100.0))


def decode(asked: float = 0.85, **more: object) -> Section:
    return Section(
        "decode", "Decode", "What is timed.", (ONE, OTHER), (ratio("engine / bare", ONE, OTHER, asked),)
    ).with_about({**ABOUT, **more})


def test_a_section_comes_back_as_it_was_written(tmp_path: Path) -> None:
    curve = Curve("engine", "rows", "tok/s", ((1.0, 2.0), (2.0, 3.5)))
    whole = Section("growth", "Growth", "What.", (ONE,), curves=(curve,), facts={"steps": 3}, warnings=("busy",))
    assert read(write(whole, tmp_path)) == whole


def test_a_ratio_is_taken_within_each_round() -> None:
    found = ratio("r", Measured("a", "s", (1.0, 20.0, 3.0)), Measured("b", "s", (2.0, 10.0, 3.0)))
    assert found.rounds == (0.5, 2.0, 1.0)
    assert found.median == 1.0
    with pytest.raises(ValueError, match="zip"):
        ratio("r", Measured("a", "s", (1.0,)), OTHER)


@pytest.mark.parametrize(
    ("asked", "at_most", "met"), [(0.9, False, True), (0.91, False, False), (0.9, True, True), (0.89, True, False)]
)
def test_what_is_asked_for_is_a_bound(asked: float, at_most: bool, met: bool) -> None:
    assert Ratio("r", (0.7, 0.9, 1.2), asked, at_most).met is met
    assert Ratio("r", (0.7,)).met is None


def test_the_document_is_made_of_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(decode(), tmp_path)
    (tmp_path / "decode.txt").write_text("Why it is so.\n")
    output = tmp_path / "benchmarks.md"
    monkeypatch.setattr(sys, "argv", ["report", "--results", str(tmp_path), "--output", str(output)])
    assert report.main() == 0
    text = output.read_text()
    assert "| Decode: engine / bare | 0.9 | ≥ 0.85 | met | full |" in text
    assert "| engine | 90 | 80 to 95 | tok/s |" in text
    assert f"![Decode]({tmp_path.name}/decode.png)" in text
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")
    for word in (
        "Why it is so.",
        "`python -m benchmarks decode --rounds 3` at 0123456789",
        "OpenBLAS 0.3.21",
        "mlx 0.32.4",
    ):
        assert word in text


def test_a_missed_figure_and_a_quick_run_are_said(tmp_path: Path) -> None:
    text = report.document([decode(0.95, full=False)], set(), {}, "benchmarks")
    assert "| 0.9 | ≥ 0.95 | **missed** | reduced |" in text
    assert report.REDUCED in text


def test_sections_come_in_the_order_of_the_list(tmp_path: Path) -> None:
    for name in ("zoo", "flood", "decode"):
        write(Section(name, name, ""), tmp_path)
    assert [section.id for section in report.load(tmp_path)] == ["decode", "flood", "zoo"]


def test_every_section_can_be_named() -> None:
    assert Scale().rounds == 5
    for module in (*report.SECTIONS.values(), *report.PEERS.values()):
        path = Path(report.__file__).parents[1] / (module.replace(".", "/") + ".py")
        assert "def section(scale: Scale) -> Section:" in path.read_text(encoding="utf-8")
