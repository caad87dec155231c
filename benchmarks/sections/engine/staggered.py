"""Section `staggered`: rows of very different lengths, more of them than slots, against mlx-lm's BatchGenerator."""

from __future__ import annotations

import contextlib
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_sampler

from benchmarks.contenders.engine import TOP_P, Engine, sampling_of
from benchmarks.measure import take_turns
from benchmarks.model import random_prompts, write_model
from benchmarks.record import Scale, Section, ratio
from rollout_server.rollout import PolicyAddress, RolloutRequest, SamplingParams

WHAT = (
    "All rows are handed over at once; their lengths are spread evenly and shuffled, and rows take the place of "
    "those that end. Sampled tokens over the time from handing over to the last row, prefill and joins included, in "
    "one process. Ours returns `logprobs`, `sampling_logprobs` and `log_kept_mass`; `BatchGenerator` "
    "(`completion_batch_size` as many as our rows, `prefill_batch_size` the faster of its default of 8 and as many as "
    "rows in one run of each) leaves its log-probabilities unread. Top-p by row: each its own between 0.9 and 1.0."
)


@dataclass(frozen=True, slots=True)
class Work:
    """What everybody decodes: a prompt and a length for each row, through `slots` at a time."""

    prompts: list[list[int]]
    lengths: list[int]
    slots: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def work_of(rows: int, slots: int, longest: int, prompt_tokens: int) -> Work:
    shortest = 16
    lengths = [round(shortest + (longest - shortest) * row / (rows - 1)) for row in range(rows)]
    random.Random(0).shuffle(lengths)
    return Work(random_prompts(rows, prompt_tokens), lengths, slots)


def section(scale: Scale) -> Section:
    work = work_of(128, 32, 512, 100) if scale.full else work_of(64, 32, 96, 32)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as engines:
        directory = write_model(Path(folder) / "qwen3-33m")
        model, _ = mlx_lm.load(str(directory))
        engine = engines.enter_context(Engine(directory, work.slots))
        prefill = max((8, work.slots), key=lambda size: theirs(model, work, size, top_p=False))
        calls = {
            "engine, one sampler": lambda: ours(engine, work, ""),
            "BatchGenerator, one sampler": lambda: theirs(model, work, prefill, top_p=False),
            f"engine, {TOP_P}": lambda: ours(engine, work, TOP_P),
            f"BatchGenerator, {TOP_P}": lambda: theirs(model, work, prefill, top_p=True),
        }
        found = take_turns(calls, "tok/s", scale.rounds)
    plain, plain_peer, by_row, by_row_peer = found.values()
    return Section(
        "staggered",
        "Staggered lengths",
        WHAT,
        tuple(found.values()),
        (
            ratio("engine / BatchGenerator, top-p by row", by_row, by_row_peer, 2.0),
            ratio("engine / BatchGenerator, one shared sampler", plain, plain_peer, 1.5),
        ),
        facts={
            "rows": len(work.lengths),
            "slots": work.slots,
            "shortest row": min(work.lengths),
            "longest row": max(work.lengths),
            "prompt tokens": len(work.prompts[0]),
            "sampled tokens": work.tokens,
            "prefill_batch_size of BatchGenerator": prefill,
        },
    )


def ours(engine: Engine, work: Work, kind: str) -> float:
    """Tokens per second."""
    groups = [
        RolloutRequest(
            id="bench",
            prompt_ids=tuple(prompt),
            sampling=SamplingParams(
                max_tokens=length, ignore_eos=True, **sampling_of(kind, row % work.slots, work.slots)
            ),
            policy=PolicyAddress("base"),
            prompt_index=row,
            seeds=(row,),
        )
        for row, (prompt, length) in enumerate(zip(work.prompts, work.lengths, strict=True))
    ]
    began = time.perf_counter()
    rollouts = engine.rollouts(groups)
    seconds = time.perf_counter() - began
    return _checked(sum(len(rollout.token_ids) for rollout in rollouts), work) / seconds


def theirs(model: nn.Module, work: Work, prefill: int, *, top_p: bool) -> float:
    """Tokens per second."""
    samplers = None
    if top_p:
        shares = [sampling_of(TOP_P, row % work.slots, work.slots)["top_p"] for row in range(len(work.prompts))]
        samplers = [make_sampler(1.0, top_p=share) for share in shares]
    began = time.perf_counter()
    generator = BatchGenerator(
        model, sampler=make_sampler(1.0), completion_batch_size=work.slots, prefill_batch_size=prefill
    )
    generator.insert(work.prompts, max_tokens=work.lengths, samplers=samplers)
    tokens = ended = 0
    while ended < len(work.lengths):
        replies = generator.next_generated()
        tokens += len(replies)
        ended += sum(reply.finish_reason is not None for reply in replies)
    mx.synchronize(generator.stream)
    seconds = time.perf_counter() - began
    generator.close()
    return _checked(tokens, work) / seconds


def _checked(tokens: int, work: Work) -> int:
    if tokens != work.tokens:
        raise RuntimeError(f"{tokens} tokens were sampled where {work.tokens} were asked for.")
    return tokens
