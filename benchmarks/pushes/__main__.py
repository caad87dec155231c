"""What a push costs a server that decodes 32 rows: bytes received, staging, throughput, 1,000 pushes, mlx-lm's way.

`python -m benchmarks.pushes [--rounds 5] [--json] [--only SECTION]…`. A real server process, a load generator in a
second process, and this one, which pushes: on a machine of two cores all three share them, so what clients cost counts
against the server. Windows are taken in turns; ratios are those of one round, then the median.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rollout_server.machine.blas import load_fast_blas

SECTIONS = ("receive", "stage", "throughput", "many", "peer")
NAME, STEADY = "trained", "steady"
PHASES = ("receive", "validate", "stage", "activate")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pushes", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="windows of each kind, taken in turns")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each window")
    parser.add_argument("--pushes", type=int, default=1000, help="of the run that looks for leaks")
    parser.add_argument(
        "--rows-on",
        choices=("switch", "finish", "steady"),
        default="switch",
        help="the rows follow the pushed name, or finish on their version (so that several share the batch), or run "
        "on another name",
    )
    parser.add_argument("--only", action="append", choices=SECTIONS, help="leave the other sections out")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, progress on stderr")
    options = parser.parse_args()
    load_fast_blas()
    # Ended from outside, it still ends the processes that it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    report = run(options)
    print(json.dumps(report, indent=2) if options.json else "\n".join(lines(report)))
    return 0


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run(options: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.model import write_model
    from benchmarks.pushes.bodies import RANK, bodies

    sections = options.only or SECTIONS
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "qwen3-33m")
        report: dict[str, Any] = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores shared by server, load generator and pusher",
            "rounds": options.rounds,
            "rows_on": options.rows_on,
            "rank": RANK,
            "bodies_mb": {name: round(body.megabytes, 2) for name, body in bodies(model).items()},
        }
        if {"receive", "stage", "throughput"} & set(sections):
            report |= under_load(model, options, sections)
        if "many" in sections:
            report["many"] = many(model, Path(folder) / "state", options.pushes)
        if "peer" in sections:
            from benchmarks.pushes.peer import swaps

            report["peer"] = swaps(model, Path(folder), options.rounds)
    return report


def under_load(model: Path, options: argparse.Namespace, sections: Sequence[str]) -> dict[str, Any]:
    from benchmarks.pushes.bodies import Pusher, bodies
    from benchmarks.pushes.windows import Watcher
    from benchmarks.servers.processes import load, server

    found: dict[str, Any] = {}
    with server("-m", "benchmarks.pushes.server", str(model)) as served:
        pusher, made = Pusher(served.url), bodies(model)
        for name in (NAME, STEADY):
            pusher.push(made["LoRA"], name)
        if "receive" in sections:
            found["receive, idle server"] = receive(pusher, made, 8 * options.rounds)
        policy = STEADY if options.rows_on == "steady" else NAME
        update = "switch" if options.rows_on == "switch" else "finish"
        watcher = Watcher(served.url, STEADY)
        with load(served, "--policy", policy, "--on-update", update):
            watcher.start()
            if "receive" in sections:
                found["receive"] = receive(pusher, made, 8 * options.rounds)
            if "stage" in sections:
                found["stage"] = {name: stage(pusher, body, 20 * options.rounds) for name, body in made.items()}
            if "throughput" in sections:
                found["throughput"] = throughput(served, pusher, made, watcher, options)
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    if not ordered:
        return {}
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return {"p50": round(statistics.median(ordered), 2), "p99": round(p99, 2), "max": round(ordered[-1], 2)}


# ---- sections -----------------------------------------------------------------------------------------------------


def receive(pusher: Any, made: dict[str, Any], times: int) -> dict[str, Any]:
    """Rates at which the push route and the bare route read the same body, in turns, MB/s."""
    found = {}
    for name in ("LoRA", "LoRA, padded"):
        body, ours, bare = made[name], [], []
        for _ in range(times):
            ours.append(body.megabytes / pusher.push(body, NAME)["receive"] * 1e3)
            bare.append(body.megabytes / pusher.discard(body)["receive"] * 1e3)
            time.sleep(0.05)
        ratios = [one / other for one, other in zip(ours, bare, strict=True)]
        found[name] = {
            "push_mb_per_s": round(statistics.median(ours)),
            "bare_mb_per_s": round(statistics.median(bare)),
            "ratio_of_medians": round(statistics.median(ours) / statistics.median(bare), 3),
            "median_of_ratios": round(statistics.median(ratios), 3),
        }
        say(f"receive {name}: {found[name]}")
    return found


def stage(pusher: Any, body: Any, times: int) -> dict[str, Any]:
    """Timings of replies, milliseconds, four pushes a second at most; `whole` is what the client waits."""
    pusher.seconds.clear()
    replies = []
    for _ in range(times):
        replies.append(pusher.push(body, NAME))
        time.sleep(0.2)
    found: dict[str, Any] = {phase: spread([reply[phase] for reply in replies]) for phase in PHASES}
    found["stage + activate"] = spread([reply["stage"] + reply["activate"] for reply in replies])
    found["whole"] = spread([1e3 * seconds for seconds in pusher.seconds])
    say(f"stage {body.name}: {found['stage + activate']}, whole {found['whole']}")
    return found


def throughput(served: Any, pusher: Any, made: dict[str, Any], watcher: Any, options: Any) -> dict[str, Any]:
    """Tokens a second undisturbed, with one push a second, and with the same bytes to the bare route."""
    from benchmarks.pushes.windows import Window, measure

    acts: dict[str, Callable[[], object] | None] = {"undisturbed": None}
    for name, body in made.items():
        acts[f"{name}: discarded"] = lambda body=body: pusher.discard(body)  # type: ignore[misc]
        acts[f"{name}: pushed"] = lambda body=body: pusher.push(body, NAME)  # type: ignore[misc]
    windows: dict[str, list[Window]] = {name: [] for name in acts}
    for number in range(options.rounds):
        # Every other round backwards, so that what follows what changes.
        for name, act in list(acts.items())[:: 1 if number % 2 == 0 else -1]:
            if options.rows_on == "finish":
                time.sleep(options.seconds)  # Rows of earlier versions end.
            windows[name].append(measure(served, watcher, options.seconds, act))
            say(f"round {number + 1}, {name}: {windows[name][-1].tokens_per_s:.0f} tok/s")
    rates = {name: [window.tokens_per_s for window in done] for name, done in windows.items()}

    def ratio(one: str, other: str) -> float:
        return round(statistics.median(a / b for a, b in zip(rates[one], rates[other], strict=True)), 3)

    return {
        "tokens_per_s": {name: round(statistics.median(values), 1) for name, values in rates.items()},
        "rounds": {name: [round(value, 1) for value in values] for name, values in rates.items()},
        "pushed / discarded": {name: ratio(f"{name}: pushed", f"{name}: discarded") for name in made},
        "pushed / undisturbed": {name: ratio(f"{name}: pushed", "undisturbed") for name in made},
        "gap_ms": {name: spread([gap for window in done for gap in window.gaps_ms]) for name, done in windows.items()},
    }


def many(model: Path, state: Path, pushes: int) -> dict[str, Any]:
    """As many pushes as fast as they go, with rows decoding: what grows."""
    from benchmarks.pushes.bodies import Pusher, bodies
    from benchmarks.servers.processes import load, server

    command = ("-m", "benchmarks.pushes.server", str(model), "--state-dir", str(state), "--keep-versions", "4")
    with server(*command) as served:
        pusher, body = Pusher(served.url), bodies(model)["LoRA"]
        pusher.push(body, NAME)
        samples = []
        with load(served, "--policy", NAME, "--rows", "8", "--tokens", "32"):
            begin = time.perf_counter()
            for number in range(1, pushes + 1):
                pusher.push(body, NAME)
                if number % max(1, pushes // 20) == 0:
                    samples.append(_held(served, state))
                    say(f"push {number}: {samples[-1]}")
            seconds = time.perf_counter() - begin
    warm = samples[len(samples) // 5 :]
    return {
        "pushes": pushes,
        "pushes_per_s": round(pushes / seconds, 1),
        "after_warm_up": warm[0],
        "at_the_end": warm[-1],
        "growth": {key: round(warm[-1][key] / warm[0][key] - 1, 4) for key in warm[0]},
        "most_over_least": {
            key: round(max(s[key] for s in warm) / min(s[key] for s in warm), 4)
            for key in ("resident_mb", "slot_bytes")
        },
    }


def _held(served: Any, state: Path) -> dict[str, float]:
    metrics = served.metrics()
    return {
        "resident_mb": round(served.resident_mb, 1),
        "slot_bytes": metrics["rollout_slot_bytes"],
        "files": sum(path.is_file() for path in state.rglob("*")),
        "state_mb": round(sum(path.stat().st_size for path in state.rglob("*") if path.is_file()) / 1e6, 1),
    }


# ---- the report ---------------------------------------------------------------------------------------------------


def lines(report: dict[str, Any], indent: str = "") -> list[str]:
    """The report as an outline."""
    shown = []
    for key, value in report.items():
        if isinstance(value, dict) and any(isinstance(inner, dict) for inner in value.values()):
            shown += [f"{indent}{key}", *lines(value, indent + "  ")]
        elif isinstance(value, dict):
            shown.append(f"{indent}{key}: " + ", ".join(f"{name} {inner}" for name, inner in value.items()))
        else:
            shown.append(f"{indent}{key}: {value}")
    return shown


if __name__ == "__main__":
    sys.exit(main())
