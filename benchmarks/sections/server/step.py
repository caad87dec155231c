"""Section `step`: a trainer's whole step, adapter, prompts and HTTP included, against whoever else can do it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import take_turns_with
from benchmarks.model import write_model
from benchmarks.record import Measured, Ratio, Scale, Section, ratio
from benchmarks.whole_job.alone import PartsAlone, Rates
from benchmarks.whole_job.job import Adapter, Job
from benchmarks.whole_job.mlx_lm import BatchGeneratorJob, PeerServer, mlx_lm_server
from benchmarks.whole_job.ours import steps_of_a_start

ROWS = 64
"""As many decode together in every contender: what our server takes on a CPU."""
BASE, LORA, GENERATOR, SERVER = "base", "LoRA", "BatchGenerator, LoRA", "mlx_lm.server, LoRA"
FIRST, SECOND = "first step", "second step"
SLOWDOWN = "second step, base / prefill alone + decode alone"
WHAT = (
    "What a trainer waits for: it pushes a LoRA (rank 16 on every linear layer, other values in every step), then "
    "asks for prompts with eight samples each at temperature 1, through HTTP and `trainer_client`, with a binary "
    "reply. Completion tokens over the time from before the first request to the arrays, push and prefill "
    "included; every step has other prompts. First and second step after a start of `rollout-server serve`, which "
    "each round starts anew; `base` pushes nothing. `BatchGenerator` runs in this process, with the same adapter "
    "and every prompt repeated, its `prefill_batch_size` the faster of 8 and as many as rows, its "
    "log-probabilities unread; `mlx_lm.server` runs as a process with the same adapter, returns "
    "log-probabilities, and is asked once for each row, 5 ms apart, since it lets few connections wait. Both have "
    "the adapter from the start, and one round before to warm up. The last ratio says what the whole costs beyond "
    "its parts: prompts as fast as the engine reads them while nothing decodes, and tokens as fast as it decodes "
    "while nothing is read."
)


@dataclass(frozen=True, slots=True)
class Contenders:
    """Each call does a step and returns tokens per second by name."""

    job: Job
    adapter: Adapter
    generator: BatchGeneratorJob
    server: PeerServer
    alone: PartsAlone

    def base(self, number: int) -> Mapping[str, float]:
        return self._ours(BASE, None, number)

    def lora(self, number: int) -> Mapping[str, float]:
        return self._ours(LORA, self.adapter, number)

    def _ours(self, name: str, adapter: Adapter | None, number: int) -> Mapping[str, float]:
        first, second = steps_of_a_start(self.job, adapter, 2 * number, 2)
        rates = (self.job.sampled / first.seconds, self.job.sampled / second.seconds)
        return dict(zip((f"{name}, {FIRST}", f"{name}, {SECOND}"), rates, strict=True))

    def peer_in_process(self, number: int) -> Mapping[str, float]:
        return {GENERATOR: self.job.sampled / self.generator.seconds(number)}

    def peer_over_http(self, number: int) -> Mapping[str, float]:
        return {SERVER: self.server.rate(number)}

    def parts(self, number: int) -> Mapping[str, float]:
        rates = self.alone.rates(number)
        return {"prefill alone": rates.prefill, "decode alone": rates.decode}


def section(scale: Scale) -> Section:
    with tempfile.TemporaryDirectory() as folder:
        path = write_model(Path(folder) / "qwen3-33m")
        job = Job(path) if scale.full else Job(path, prompts=8, prompt_tokens=64, tokens=32)
        return compare(job, Path(folder), scale.rounds)


def compare(job: Job, folder: Path, rounds: int) -> Section:
    """`folder` is for the adapter."""
    adapter = Adapter.of(job.model)
    for_mlx_lm = adapter.save_for_mlx_lm(folder / "adapter")
    with contextlib.ExitStack() as stack:
        each = Contenders(
            job,
            adapter,
            BatchGeneratorJob(job, ROWS, for_mlx_lm),
            stack.enter_context(mlx_lm_server(job, ROWS, for_mlx_lm)),
            stack.enter_context(PartsAlone(job, ROWS)),
        )
        for warm_up in (each.peer_in_process, each.peer_over_http, each.parts):
            warm_up(0)
        calls = [each.base, each.lora, each.peer_in_process, each.peer_over_http, each.parts]
        found = take_turns_with(calls, "tok/s", rounds)
    facts = {**job.facts, "rows together": ROWS, "MB of the adapter": round(adapter.megabytes, 1)}
    facts["prefill_batch_size of BatchGenerator"] = each.generator.prefill
    return Section("step", "A trainer's step", WHAT, tuple(found.values()), ratios(job, found), facts=facts)


def ratios(job: Job, found: Mapping[str, Measured]) -> tuple[Ratio, ...]:
    """What is asked of the figures, out of each round's own."""
    ours, base = found[f"{LORA}, {SECOND}"], found[f"{BASE}, {SECOND}"]
    rounds = zip(base.rounds, found["prefill alone"].rounds, found["decode alone"].rounds, strict=True)
    slowdown = tuple(job.sampled / rate / Rates(prefill, decode).seconds(job) for rate, prefill, decode in rounds)
    return (
        ratio(f"{LORA}, {SECOND} / BatchGenerator", ours, found[GENERATOR], 1.5),
        ratio(f"{LORA}, {SECOND} / mlx_lm.server", ours, found[SERVER], 2.5),
        ratio(f"{LORA}, {FIRST} / {SECOND}", found[f"{LORA}, {FIRST}"], ours),
        ratio(f"{LORA} / {BASE}, {SECOND}", ours, base),
        Ratio(SLOWDOWN, slowdown, 1.1, at_most=True),
    )
