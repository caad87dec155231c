"""Every benchmark, one section after the other, each in a process of its own; results go to docs/benchmarks/*.json.

`python -m benchmarks [SECTION …] [--rounds 5] [--full] [--output DIR] [--json]`. Without names all sections run, at
sizes that take less than a quarter of an hour; `--full` measures at the sizes the figures are asked for.
`python -m benchmarks.report` then writes docs/benchmarks.md and its charts.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.record import RESULTS, Scale, rounded, write
from benchmarks.sections.order import PEERS, SECTIONS
from rollout_server.machine.blas import load_fast_blas


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join([*SECTIONS, *PEERS]))
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each contender, taken in turns")
    parser.add_argument("--full", action="store_true", help="the sizes the figures are asked for")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--json", action="store_true", help="also print the results as one JSON object on stdout")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    known = {**SECTIONS, **PEERS}
    if unknown := [name for name in options.sections if name not in known]:
        parser.error(f"no section is called {', '.join(unknown)}; there are {', '.join(known)}")
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    names = options.sections or list(SECTIONS)
    if options.here:
        measure(names[0], known[names[0]], Scale(options.rounds, options.full), options.output)
        return 0
    failed = run_all(names, options)
    if options.json:
        done = (options.output / f"{name}.json" for name in names if name not in failed)
        print(json.dumps({path.stem: json.loads(path.read_text("utf-8")) for path in done}))
    if failed:
        print(f"These failed: {', '.join(failed)}.", file=sys.stderr)
    return 1 if failed else 0


def run_all(names: list[str], options: argparse.Namespace) -> list[str]:
    """Run sections in processes of their own, so that none inherits the memory of another; names of those that failed.
    A failure does not stop the rest."""
    failed = []
    for number, name in enumerate(names, 1):
        print(f"[{number}/{len(names)}] {name}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "benchmarks", "--here", name, "--rounds", str(options.rounds)]
        command += ["--output", str(options.output), *(["--full"] if options.full else [])]
        if subprocess.run(command, stdout=sys.stderr).returncode:
            failed.append(name)
    return failed


def measure(name: str, module: str, scale: Scale, folder: Path) -> None:
    """Measure one section in this process and write its result."""
    blas = load_fast_blas()  # Before anything imports mlx.

    from benchmarks.machine import describe_machine

    machine = describe_machine(blas.name)
    command = shlex.join(["python", "-m", "benchmarks", name, "--rounds", str(scale.rounds)])
    began = time.perf_counter()
    section = importlib.import_module(module).section(scale)
    about = {
        **machine,
        "command": command + (" --full" if scale.full else ""),
        "full": scale.full,
        "rounds": scale.rounds,
        "minutes": (time.perf_counter() - began) / 60,
    }
    path = write(section.with_about(rounded(about)), folder)
    for figure in section.ratios:
        bound = "" if figure.asked is None else f" (asked: {'≤' if figure.at_most else '≥'} {figure.asked:g})"
        print(f"  {figure.name}: {figure.median:.3f}{bound}")
    for warning in section.warnings:
        print(f"  {warning}")
    print(f"  {path}, {about['minutes']:.1f} min")


if __name__ == "__main__":
    sys.exit(main())
