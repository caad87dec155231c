"""Where the time of a timeline went: `python -m benchmarks.studies.timeline FILE`, a FILE of `serve --trace FILE`.

Two tables: what the turns did, by what they read and stepped; and every kind of part, with the time that none of its
own parts accounts for. `settle` is waiting for the device; all else is what the host does beside it, or before it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TURN, IDLE = "turn", "idle"


@dataclass
class Part:
    """One slice of the turns' track and what lies directly inside it; microseconds."""

    name: str
    begin: float
    end: float
    values: dict[str, Any]
    inside: list[Part] = field(default_factory=list)

    @property
    def own(self) -> float:
        return self.end - self.begin - sum(part.end - part.begin for part in self.inside)

    def all(self) -> Iterator[Part]:
        yield self
        for part in self.inside:
            yield from part.all()

    def total(self, name: str, value: str) -> int:
        return sum(part.values.get(value, 0) for part in self.all() if part.name == name)


def parts_of(text: str) -> list[Part]:
    """What lies in no other slice of the track of turns: turns, and the load. The file may lack its end, or be empty
    until the engine has done something."""
    if not text.strip():
        return []
    events = json.loads(text if text.rstrip().endswith("]") else text + "]")
    tracks = {each["args"]["name"]: each["tid"] for each in events if each["name"] == "thread_name"}
    slices = [event for event in events if event["ph"] == "X" and event["tid"] == tracks["turns"]]
    outer: list[Part] = []
    stack: list[Part] = []
    # A slice stands in the file behind what lies inside it, also where both begin at once and are as long.
    for _, event in sorted(enumerate(slices), key=lambda each: (each[1]["ts"], -each[1]["dur"], -each[0])):
        part = Part(event["name"], event["ts"], event["ts"] + event["dur"], event.get("args", {}))
        while stack and part.end > stack[-1].end + 0.05:
            stack.pop()
        (stack[-1].inside if stack else outer).append(part)
        stack.append(part)
    return outer


def kind_of(turn: Part) -> str:
    did = [
        word
        for word, does in (
            ("read", turn.total("read", "tokens") or turn.total("recompute", "tokens")),
            ("score", turn.total("score", "tokens")),
            ("step", turn.total("step", "rows")),
        )
        if does
    ]
    return ", ".join(did) or "none of these"


def tables(parts: Sequence[Part]) -> list[str]:
    """Both, as lines."""
    turns: dict[str, list[Part]] = defaultdict(list)
    for part in parts:
        if part.name == TURN:
            turns[kind_of(part)].append(part)
    lines = [f"{'turns that':<20} {'count':>7} {'seconds':>9} {'ms each':>8} {'tokens read':>12} {'rows stepped':>13}"]
    for kind, those in sorted(turns.items()):
        # Waiting for work is nobody's cost.
        idle = sum(part.end - part.begin for turn in those for part in turn.all() if part.name == IDLE)
        seconds = (sum(turn.end - turn.begin for turn in those) - idle) / 1e6
        read = sum(turn.total("read", "tokens") + turn.total("recompute", "tokens") for turn in those)
        rows = sum(turn.total("step", "rows") for turn in those)
        lines.append(
            f"{kind:<20} {len(those):>7} {seconds:>9.3f} {1e3 * seconds / len(those):>8.2f} {read:>12} {rows:>13}"
        )
    own: dict[str, list[float]] = defaultdict(list)
    for part in (each for whole in parts for each in whole.all()):
        own[part.name].append(part.own)
    lines += ["", f"{'part':<20} {'count':>7} {'own s':>9} {'own ms each':>12}"]
    for name, each in sorted(own.items(), key=lambda item: -sum(item[1])):
        lines.append(f"{name:<20} {len(each):>7} {sum(each) / 1e6:>9.3f} {sum(each) / len(each) / 1e3:>12.3f}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.timeline", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    found = parts_of(parser.parse_args().file.read_text("utf-8"))
    print("\n".join(tables(found)) if found else "There is no turn in the file yet.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
