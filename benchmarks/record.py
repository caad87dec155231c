"""What a benchmark leaves behind: figures of every round, ratios and what was asked for, as one JSON file a section."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "docs" / "benchmarks"


@dataclass(frozen=True, slots=True)
class Scale:
    """How much to measure: rounds of each contender, and whether at the sizes the figures are asked for."""

    rounds: int = 5
    full: bool = False


@dataclass(frozen=True, slots=True)
class Measured:
    """One contender: a figure for every round."""

    name: str
    unit: str
    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)


@dataclass(frozen=True, slots=True)
class Ratio:
    """A figure that something is asked of; `rounds` holds the ratio within each round, so that drift cancels."""

    name: str
    rounds: tuple[float, ...]
    asked: float | None = None
    at_most: bool = False
    """True if `asked` is an upper bound."""

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def met(self) -> bool | None:
        """None where nothing is asked."""
        if self.asked is None:
            return None
        return self.median <= self.asked if self.at_most else self.median >= self.asked


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a chart: (x, y) points, y medians of the rounds. Curves with one pair of labels share a panel."""

    name: str
    x_label: str
    y_label: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Section:
    """One section of the report. `what` says what is timed, in sentences; `facts` are sizes and counts by name."""

    id: str
    title: str
    what: str
    measured: tuple[Measured, ...] = ()
    ratios: tuple[Ratio, ...] = ()
    curves: tuple[Curve, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)
    """Machine, commit, command and scale; the runner fills it in."""

    def with_about(self, about: dict[str, Any]) -> Section:
        return replace(self, about=about)


def ratio(name: str, one: Measured, other: Measured, asked: float | None = None, *, at_most: bool = False) -> Ratio:
    """`one` / `other`, round by round. Raises ValueError where their rounds do not pair."""
    rounds = tuple(a / b for a, b in zip(one.rounds, other.rounds, strict=True))
    return Ratio(name, rounds, asked, at_most)


def write(section: Section, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{section.id}.json"
    path.write_text(json.dumps(rounded(asdict(section)), indent=1) + "\n", encoding="utf-8")
    return path


def read(path: Path) -> Section:
    """Raises ValueError or TypeError on a file that `write` did not make."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content["measured"] = tuple(Measured(**{**m, "rounds": tuple(m["rounds"])}) for m in content["measured"])
    content["ratios"] = tuple(Ratio(**{**r, "rounds": tuple(r["rounds"])}) for r in content["ratios"])
    content["curves"] = tuple(
        Curve(**{**curve, "points": tuple((x, y) for x, y in curve["points"])}) for curve in content["curves"]
    )
    content["warnings"] = tuple(content["warnings"])
    return Section(**content)


def rounded(value: Any) -> Any:
    """Floats with six digits: more is noise, and makes differences of two runs unreadable."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list | tuple) else value
