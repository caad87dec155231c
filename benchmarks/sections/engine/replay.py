"""Section `replay`: rows sampled in a busy mixed batch, drawn again by `/v1/replay`'s engine job, and sampled once more
alone by their seed.

`python -m benchmarks.sections.engine.replay [--rows 1024] [--demo] [--plain] [--kv-bits 8]` prints the margin of each
difference.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import Measured, Ratio, Scale, Section
from rollout_server.engine.handle import EngineHandle
from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.messages.rollouts import RowFinished
from rollout_server.engine.messages.scoring import RecordedRow, Replay, ReplayedRow
from rollout_server.machine.blas import load_fast_blas
from rollout_server.rollout import PolicyAddress, Rollout, RolloutRequest, SamplingParams, SpanAddress

VOCABULARY = 4096
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 384}
PLAIN: dict[str, Any] = {}
KINDS: tuple[dict[str, Any], ...] = (
    PLAIN,
    {"temperature": 0.7},
    {"top_p": 0.9},
    {"temperature": 1.3, "top_k": 50, "min_p": 0.01},
    {"presence_penalty": 0.5, "frequency_penalty": 0.2, "repetition_penalty": 1.1},
    {"temperature": 0.0},
)
CLOSE = 1e-5
TOKENS = 256
WHAT = (
    f"Rows of {TOKENS} tokens, more than the 32 places of the batch, of six kinds of sampling (temperatures, top-p, "
    "top-k, min-p, penalties, greedy) in turn; then all are given to the replay job, which reads them in chunks and "
    "draws each token again; some are sampled once more alone by their seed. The embedded model is trained; the random "
    "one has 4,096 tokens about as probable as each other, so that a uniform is seldom far from a boundary. A "
    "difference is explained if uniforms within 1e-5, or a filter's edge as close, give the recorded token."
)
DEMO = Path(__file__).parents[3] / "rollout_server" / "demo" / "model"


def groups_of(rows: int, tokens: int, vocabulary: int, kinds: Sequence[dict[str, Any]]) -> list[RolloutRequest]:
    """Prompts of 4 to 64 tokens. More rows than places, so that some join while others run."""
    generator = np.random.default_rng(0)
    return [
        RolloutRequest(
            id="busy",
            prompt_ids=tuple(generator.integers(0, vocabulary, size=int(generator.integers(4, 65))).tolist()),
            sampling=SamplingParams(max_tokens=tokens, ignore_eos=True, **kinds[row % len(kinds)]),
            policy=PolicyAddress("base"),
            prompt_index=row,
            seeds=(int(generator.integers(0, 2**53)),),
        )
        for row in range(rows)
    ]


async def sampled(handle: EngineHandle, groups: Sequence[RolloutRequest]) -> list[Rollout]:
    rows = [event.rollout async for event in handle.submit("busy", groups) if isinstance(event, RowFinished)]
    return sorted(rows, key=lambda row: row.prompt_index)


def recorded(row: Rollout) -> RecordedRow:
    spans = tuple(SpanAddress(PolicyAddress("base"), s.start, s.end, s.version.digest, s.kv) for s in row.spans)
    judged = (True,) * len(row.token_ids)
    return RecordedRow(row.prompt_ids, row.token_ids, spans, judged, row.logprobs, row.sampling, row.seed)


async def replayed(handle: EngineHandle, rows: Sequence[Rollout]) -> list[ReplayedRow]:
    return list((await handle.replay(Replay(handle.new_id("replay"), tuple(map(recorded, rows))))).rows)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one model gave."""

    rows: list[Rollout]
    found: list[ReplayedRow]
    sampled_per_s: float
    replayed_per_s: float
    alone: list[bool]
    """True if a row came again when sampled alone by its seed."""

    @property
    def exact(self) -> float:
        return sum(row.exact for row in self.found) / len(self.found)

    @property
    def unexplained(self) -> int:
        return sum(not row.exact and not explained(row) for row in self.found)

    @property
    def largest(self) -> float:
        return max(row.max_abs_logprob_difference or 0.0 for row in self.found)


def explained(row: ReplayedRow) -> bool:
    return row.margin is not None and row.margin <= CLOSE


async def outcome(rows: int, again: int, path: Path, kinds: Sequence[dict[str, Any]], kv_bits: int | None) -> Outcome:
    handle = EngineHandle(EngineOptions(str(path), "small", max_batch=32, kv_bits=kv_bits))
    handle.start()
    await handle.wait_ready()
    groups = groups_of(rows, TOKENS, handle.info.vocab_size, kinds)
    begin = time.perf_counter()
    busy = await sampled(handle, groups)
    between = time.perf_counter()
    found = await replayed(handle, busy)
    end = time.perf_counter()
    alone = [(await sampled(handle, [group]))[0] for group in groups[:again]]
    same = [one.token_ids == other.token_ids for one, other in zip(alone, busy, strict=False)]
    await handle.close()
    return Outcome(busy, found, rows * TOKENS / (between - begin), rows * TOKENS / (end - between), same)


def section(scale: Scale) -> Section:
    from tests.support.tiny_models import build

    rows, again = (1024, 64) if scale.full else (256, 16)
    with tempfile.TemporaryDirectory() as folder:
        models = {"embedded": DEMO, "random": build("qwen3", Path(folder) / "model", **SHAPE)}
        found = {name: asyncio.run(outcome(rows, again, path, KINDS, kv_bits=None)) for name, path in models.items()}
    ratios, measured, facts = [], [], {"rows": rows, "tokens of a row": TOKENS}
    for name, one in found.items():
        ratios += [
            Ratio(f"{name} model: share of rows drawn again exactly", (one.exact,), 0.999),
            Ratio(f"{name} model: differences that are not explained", (float(one.unexplained),), 0.0, at_most=True),
            Ratio(f"{name} model: largest difference of a log-probability", (one.largest,)),
            Ratio(f"{name} model: share that came again sampled alone", (sum(one.alone) / again,)),
        ]
        measured += [
            Measured(f"{name} model: sampled", "tok/s", (one.sampled_per_s,)),
            Measured(f"{name} model: replayed", "tok/s", (one.replayed_per_s,)),
        ]
        facts[f"rows of the {name} model that differ"] = sum(not row.exact for row in one.found)
    return Section("replay", "Replay", WHAT, tuple(measured), tuple(ratios), facts=facts)


def report(one: Outcome) -> str:
    lines = [
        f"{len(one.rows)} rows of {TOKENS} tokens in batches of 32: {one.sampled_per_s:.0f} tokens/s, "
        f"replayed {one.replayed_per_s:.0f} tokens/s",
        f"exact: {100 * one.exact:.2f} %, alone {sum(one.alone)} of {len(one.alone)}; not explained: "
        f"{one.unexplained}; largest difference of log-probabilities {one.largest:.1e}",
    ]
    for row, kept in zip(one.found, one.rows, strict=True):
        if not row.exact:
            kind = {name: getattr(kept.sampling, name) for name in ("temperature", "top_p", "top_k", "min_p")}
            margin = "none" if row.margin is None else f"{row.margin:.1e}"
            lines.append(f"  token {row.first_difference}: margin {margin}, {kind}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sections.engine.replay", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--again", type=int, default=64, help="rows that are sampled again alone")
    parser.add_argument("--plain", action="store_true", help="temperature 1 only")
    parser.add_argument("--demo", action="store_true", help="the embedded model, which is trained")
    parser.add_argument("--kv-bits", type=int, choices=[8], help="keep keys and values in so many bits")
    options = parser.parse_args()
    from tests.support.tiny_models import build

    with tempfile.TemporaryDirectory() as folder:
        path = DEMO if options.demo else build("qwen3", Path(folder) / "model", **SHAPE)
        kinds = (PLAIN,) if options.plain else KINDS
        one = asyncio.run(outcome(options.rows, options.again, path, kinds, options.kv_bits))
    print(report(one))
    return 1 if one.unexplained else 0


if __name__ == "__main__":
    load_fast_blas()
    sys.exit(main())
