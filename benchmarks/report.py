"""Turn docs/benchmarks/*.json into docs/benchmarks.md and charts. Nothing is measured and nothing typed in by hand.

`python -m benchmarks.report [--results DIR] [--output FILE]`. A file NAME.txt beside NAME.json holds notes on a
section, such as why a figure is out of reach; it is copied below the section's tables.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.charts import draw
from benchmarks.record import RESULTS, Ratio, Section, read
from benchmarks.sections.order import ONE_SIZE, PEERS, SECTIONS

HEAD = """# Benchmarks

Made by `python -m benchmarks.report` from `docs/benchmarks/*.json`, which `make bench` and `make bench-peers` write; do
not edit it. Contenders of a section run side by side in turns, one warm-up round first; figures are medians of the
rounds, ratios the median of each round's ratio, with the smallest and largest round behind them. Sizes and
machine stand with each section. Only figures of one section compare.
"""
REDUCED = "Reduced size: a quick run; the figure asked for is about the full size (`--full`)."


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files and notes")
    parser.add_argument("--output", type=Path, default=RESULTS.with_suffix(".md"), help="the document to write")
    options = parser.parse_args()
    sections = load(options.results)
    if not sections:
        parser.error(f"{options.results} holds no results: run `make bench` first")
    charts = {s.id for s in sections if draw(s, options.results / f"{s.id}.png")}
    pictures = options.results.name
    options.output.write_text(document(sections, charts, notes(sections, options.results), pictures), encoding="utf-8")
    print(options.output)
    return 0


def load(folder: Path) -> list[Section]:
    """Known sections in their order, then others by name."""
    found = {path.stem: read(path) for path in sorted(folder.glob("*.json"))}
    order = [name for name in (*SECTIONS, *PEERS) if name in found]
    return [found[name] for name in (*order, *(name for name in found if name not in order))]


def notes(sections: list[Section], folder: Path) -> dict[str, str]:
    paths = {section.id: folder / f"{section.id}.txt" for section in sections}
    return {id: path.read_text(encoding="utf-8").strip() for id, path in paths.items() if path.exists()}


def document(sections: list[Section], charts: set[str], notes: dict[str, str], pictures: str) -> str:
    blocks = [HEAD, "## What was asked for\n", table(ASKED, asked(sections))]
    if missing := sorted({*SECTIONS, *PEERS} - {section.id for section in sections}):
        blocks.append(f"Not measured: {', '.join(missing)}.\n")
    for section in sections:
        blocks += [f"\n## {section.title}\n", section.what + "\n"]
        if section.id in charts:
            blocks.append(f"![{section.title}]({pictures}/{section.id}.png)\n")
        if section.measured:
            rows = ([m.name, f"{m.median:.4g}", span(m.rounds), m.unit] for m in section.measured)
            blocks.append(table(["contender", "median", "rounds", "unit"], rows))
        if section.ratios:
            blocks.append(table(["ratio", "median", "rounds", "asked"], map(ratio_row, section.ratios)))
        blocks += [*section.warnings, *([notes[section.id] + "\n"] if section.id in notes else []), about(section)]
    return "\n".join(blocks)


ASKED = ["figure", "measured", "asked", "", "size"]


def asked(sections: Iterable[Section]) -> Iterator[list[str]]:
    for section in sections:
        for figure in section.ratios:
            if figure.asked is not None:
                verdict = "met" if figure.met else "**missed**"
                size = "full" if whole(section) else "reduced"
                yield [f"{section.title}: {figure.name}", f"{figure.median:.3g}", bound(figure), verdict, size]


def whole(section: Section) -> bool:
    return section.id in ONE_SIZE or section.about.get("full", True)


def ratio_row(figure: Ratio) -> list[str]:
    return [figure.name, f"{figure.median:.3g}", span(figure.rounds), bound(figure)]


def bound(figure: Ratio) -> str:
    return "" if figure.asked is None else f"{'≤' if figure.at_most else '≥'} {figure.asked:g}"


def span(rounds: tuple[float, ...]) -> str:
    return f"{min(rounds):.3g} to {max(rounds):.3g}" if len(rounds) > 1 else "one"


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def about(section: Section) -> str:
    """Sizes, then command, commit, machine and versions."""
    a = section.about
    sizes = ", ".join(f"{name} {value}" for name, value in section.facts.items())
    versions = ", ".join(f"{name} {version}" for name, version in a.get("versions", {}).items())
    lines = [f"Sizes: {sizes}." if sizes else "", "" if whole(section) else REDUCED]
    if a:
        lines.append(
            f"`{a['command']}` at {a['commit']}, {a['when'][:10]}, {a['minutes']:.1f} minutes; {a['cores']} cores of "
            f"{a['processor']}, {a['memory_gib']:g} GiB, {a['system']}; Python {a['python']}, {versions}; "
            f"BLAS {a['blas']}; load before: {a['load_before']:g}."
        )
    return "\n".join(line for line in lines if line) + "\n"


if __name__ == "__main__":
    sys.exit(main())
