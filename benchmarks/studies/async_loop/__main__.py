"""Seconds until the demo's accuracy, for loops that overlap and loops that do not.

`python -m benchmarks.studies.async_loop [--rounds 5] [--steps 40] [--staleness 1] [--plot FILE.png] [--json]` runs the
loops of `examples/async_grpo.py` on the embedded model, in turns, and in another order each round. One after the other,
server and trainer each have all cores, or half of them; overlapping, half each. A version's accuracy is that of 256
held-out problems, greedily, found when its loop has ended. Where a loop is not there sooner, its busy cores say why:
processor seconds of both processes over the seconds that it took.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from benchmarks.servers.processes import Served, server
from examples.async_grpo import Update, accuracies, train
from rollout_server.demo.run import ending_in_order
from trainer_client import RolloutClient

GOALS = (0.9, 0.95, 0.98)
ASKED = 0.8
"""A share of the seconds of the quickest loop that does not overlap."""


@dataclass(frozen=True, slots=True)
class Loop:
    name: str
    staleness: int
    threads: int
    """They compute products, in the server and in the trainer each."""


@dataclass(frozen=True, slots=True)
class Run:
    """One loop to its end."""

    reached: dict[float, float]
    """Seconds to each accuracy; without those that it did not reach."""
    seconds: float
    """The median step."""
    busy: float
    """Cores, on average."""
    staleness: int
    """The largest."""
    rewards: tuple[tuple[float, float], ...]
    """(Seconds, mean reward) of each update."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.async_loop", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=5, help="runs of each loop, taken in turns")
    parser.add_argument("--steps", type=int, default=40, help="updates of each run")
    parser.add_argument("--staleness", type=int, default=1, help="the most, where sampling overlaps")
    parser.add_argument("--prompts", type=int, default=32, help="of a step, eight rollouts each")
    parser.add_argument("--plot", help="draws the rewards of the last round")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    options = parser.parse_args()
    cores = os.cpu_count() or 1
    half = max(1, cores // 2)
    loops = (
        Loop("one after the other, all cores", 0, cores),
        Loop("one after the other, half", 0, half),
        Loop(f"overlapping, staleness ≤ {options.staleness}", options.staleness, half),
    )
    runs = measure(loops, options)
    if options.plot:
        draw(options.plot, {loop.name: runs[loop][-1] for loop in loops})
    report = {loop.name: figures(runs[loop]) for loop in loops} | {"ratios": ratios(loops, runs)}
    print(json.dumps(report, indent=None if options.json else 2))
    return 0


def measure(loops: tuple[Loop, ...], options: argparse.Namespace) -> dict[Loop, list[Run]]:
    runs: dict[Loop, list[Run]] = {loop: [] for loop in loops}
    # A study that is told to stop takes its servers along.
    with ending_in_order(), ExitStack() as stack:
        served = {
            threads: stack.enter_context(
                server("-m", "rollout_server", "serve", "--port", "0", OPENBLAS_NUM_THREADS=str(threads))
            )
            for threads in {loop.threads for loop in loops}
        }
        for turn in range(-1, options.rounds):
            # Whoever comes first profits or suffers from what the machine does meanwhile: they take turns.
            for loop in loops[turn % len(loops) :] + loops[: turn % len(loops)]:
                steps = options.steps if turn >= 0 else 2  # the first warms up
                run = once(served[loop.threads], loop, steps, options.prompts, f"turn-{turn}-{loops.index(loop)}")
                if turn >= 0:
                    runs[loop].append(run)
                    load = os.getloadavg()[0]
                    print(f"round {turn}  {loop.name}: {run.reached}, load {load:.1f}", file=sys.stderr, flush=True)
    return runs


def once(served: Served, loop: Loop, steps: int, prompts: int, name: str) -> Run:
    give_threads(loop.threads)
    with RolloutClient(served.url) as client:
        before, began = processor_s(served.pid), time.perf_counter()
        updates = list(train(client, name, loop.staleness, steps, prompts))
        seconds, busy = time.perf_counter() - began, processor_s(served.pid) - before
        run = Run(
            reached=dict(first_times(client, updates)),
            seconds=statistics.median(b.seconds - a.seconds for a, b in pairwise(updates)),
            busy=busy / seconds,
            staleness=max(update.staleness for update in updates),
            rewards=tuple((update.seconds, update.reward) for update in updates),
        )
        client.delete_policy(name)
    return run


def first_times(client: RolloutClient, updates: list[Update]) -> Iterator[tuple[float, float]]:
    """(Accuracy, seconds until the first version that has it)."""
    goals = list(GOALS)
    for update, accuracy in zip(updates, accuracies(client, updates), strict=True):
        while goals and accuracy >= goals[0]:
            yield goals.pop(0), round(update.seconds, 1)
        if not goals:
            return


def give_threads(count: int) -> None:
    """To the products of this process, where OpenBLAS computes them."""
    process = ctypes.CDLL(None)
    if hasattr(process, "openblas_set_num_threads"):
        process.openblas_set_num_threads(count)


def processor_s(pid: int) -> float:
    """Seconds of the processor that this process and the server have taken; without /proc this one's alone."""
    stat = Path(f"/proc/{pid}/stat")
    ticks = sum(map(int, stat.read_text().rpartition(")")[2].split()[11:13])) if stat.exists() else 0
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def figures(runs: list[Run]) -> dict[str, object]:
    """Medians, and every run's own seconds to each accuracy."""
    return {
        "seconds to accuracy": {goal: [run.reached.get(goal) for run in runs] for goal in GOALS},
        "seconds a step": round(statistics.median(run.seconds for run in runs), 3),
        "cores busy": round(statistics.median(run.busy for run in runs), 2),
        "largest staleness": max(run.staleness for run in runs),
    }


def ratios(loops: tuple[Loop, ...], runs: dict[Loop, list[Run]]) -> dict[str, object]:
    """The overlapping loop against the quicker of the others in the same round: medians; None where not all arrived."""
    *plain, overlapping = loops
    found: dict[str, object] = {"asked": f"≤ {ASKED}"}
    for goal in GOALS:
        pairs = [
            (run.reached.get(goal), [runs[loop][at].reached.get(goal) for loop in plain])
            for at, run in enumerate(runs[overlapping])
        ]
        each = [one / min(other for other in others if other) for one, others in pairs if one and any(others)]
        found[str(goal)] = round(statistics.median(each), 3) if len(each) == len(pairs) else None
    step = min(statistics.median(run.seconds for run in runs[loop]) for loop in plain)
    found["a step"] = round(statistics.median(run.seconds for run in runs[overlapping]) / step, 3)
    return found


def draw(path: str, runs: dict[str, Run]) -> None:
    from matplotlib.figure import Figure

    axes = Figure(layout="constrained").subplots()
    for name, run in runs.items():
        axes.plot(*zip(*run.rewards, strict=True), label=name)
    axes.set(xlabel="seconds", ylabel="mean reward", title="GRPO until the demo's accuracy")
    axes.legend()
    axes.grid(alpha=0.3)
    axes.figure.savefig(path, dpi=120)


if __name__ == "__main__":
    raise SystemExit(main())
