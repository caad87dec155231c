"""Parts about a server process: a trainer's step through HTTP, and pushes beside rows that decode."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.pushes.windows import Watcher, measure
from benchmarks.servers.compared import our_process
from benchmarks.servers.processes import Served, load
from benchmarks.studies.gpu.figures import Figure, in_turns, over
from benchmarks.studies.gpu.held import Held
from benchmarks.whole_job.job import Adapter
from benchmarks.whole_job.ours import POLICY, steps_of_a_start
from trainer_client import RolloutClient

OTHER = "other"
PUSHED_MB = 40.0
"""What the figure is asked for: about a LoRA of rank 16 on every linear layer of 0.6B."""


def step_lora(held: Held) -> Iterator[Figure]:
    """A trainer's step with its push: the first after a start, the second, and those behind."""
    yield from _steps(held, "LoRA", held.adapter(), 12000)


def step_base(held: Held) -> Iterator[Figure]:
    """The same without a push."""
    yield from _steps(held, "base", None, 15000)


def _steps(held: Held, name: str, adapter: Adapter | None, asked: float) -> Iterator[Figure]:
    held.free()
    job = held.job()
    steps = steps_of_a_start(job, adapter, 1, 2 + held.rounds, *held.trace_options(f"step-{name}"))
    rates = [job.sampled / step.seconds for step in steps]
    yield Figure(f"{name}, first step", "tok/s", (rates[0],))
    yield Figure(f"{name}, second step", "tok/s", (rates[1],), asked)
    yield Figure(f"{name}, later steps", "tok/s", tuple(rates[2:]))
    yield Figure(f"{name}, first step / what is asked of the second", "", (rates[0] / asked,), 0.5)
    if adapter is not None:
        yield Figure(f"{name}, push of {adapter.megabytes:.0f} MB", "ms", tuple(1e3 * step.push_s for step in steps))


def pushes(held: Held) -> Iterator[Figure]:
    """Rows that decode while a version is pushed every second: to a name that none of them uses, and to their own."""
    held.free()
    size, adapter = held.size, held.adapter()
    options = ("--rows", str(size.rows), "--prompt-tokens", str(size.short), "--tokens", str(size.tokens))
    with our_process(held.path(), *held.trace_options("pushes")) as served, RolloutClient(served.url) as client:

        def push(name: str) -> Callable[[], object]:
            return lambda: client.push(name, adapter.trained(), adapter.config)

        push(POLICY)()
        with load(served, "--policy", POLICY, *options):
            acts = {"no push": None, "pushes to another name": push(OTHER), "pushes to the rows' name": push(POLICY)}
            calls = {name: _window(served, size.window_s, act) for name, act in acts.items()}
            rates = in_turns(calls, held.rounds)
    for name, found in rates.items():
        yield Figure(name, "tok/s", found)
    asked = 0.95 if adapter.megabytes >= PUSHED_MB else None
    label = f"{adapter.megabytes:.0f} MB a second"
    yield Figure(f"{label} to another name / none", "", over(rates["pushes to another name"], rates["no push"]), asked)
    yield Figure(f"{label} to the rows' name / none", "", over(rates["pushes to the rows' name"], rates["no push"]))


def _window(served: Served, seconds: float, act: Callable[[], object] | None) -> Callable[[], float]:
    # Nobody streams: a row that is read as it comes changes how prompts are read beside it.
    return lambda: measure(served, Watcher(served.url, POLICY), seconds, act).tokens_per_s
