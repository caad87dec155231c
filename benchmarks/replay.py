"""Rows sampled in a busy mixed batch, drawn again by `/v1/replay`'s engine job, and sampled again alone by their seed.

    python -m benchmarks.replay --rows 1024 --tokens 256 --demo

The model is the embedded one, or random with a vocabulary of 4,096, the hardest there is: thousands of tokens are about
as probable, so that a uniform is seldom far from a boundary. Rows of every kind of sampling join and
leave a batch of 32 rows. Prints how many come again exactly, and the margin of each difference.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rollout_server.blas import load_fast_blas
from rollout_server.engine.handle import EngineHandle
from rollout_server.engine.messages import EngineOptions, RowFinished
from rollout_server.engine.replays import RecordedRow, Replay, ReplayedRow
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
DEMO = Path(__file__).parent.parent / "rollout_server" / "demo" / "model"


def groups_of(rows: int, tokens: int, vocabulary: int, kinds: Sequence[dict[str, Any]]) -> list[RolloutRequest]:
    """Prompts of 4 to 64 tokens; some rows are shorter, so that others join while the batch runs."""
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


def report(title: str, found: Sequence[ReplayedRow], rows: Sequence[Rollout]) -> None:
    exact = sum(row.exact for row in found)
    print(f"{title}: {exact} of {len(found)} rows exact ({100 * exact / len(found):.2f} %)")
    gaps = [row.max_abs_logprob_difference for row in found if row.max_abs_logprob_difference is not None]
    print(f"  largest difference of log-probabilities {max(gaps):.1e}")
    for row, kept in zip(found, rows, strict=True):
        if row.exact:
            continue
        near = row.margin is not None and row.margin <= CLOSE
        kind = {name: getattr(kept.sampling, name) for name in ("temperature", "top_p", "top_k", "min_p")}
        print(f"  token {row.first_difference}: margin {row.margin:.1e}{'' if near else ' (NOT EXPLAINED)'}, {kind}")


async def main(
    rows: int, tokens: int, again: int, directory: Path, plain: bool, demo: bool, kv_bits: int | None
) -> None:
    load_fast_blas()
    from tests.tiny_models import build

    path = DEMO if demo else build("qwen3", directory / "model", **SHAPE)
    handle = EngineHandle(EngineOptions(str(path), "small", max_batch=32, kv_bits=kv_bits))
    handle.start()
    await handle.wait_ready()
    groups = groups_of(rows, tokens, handle.info.vocab_size, (PLAIN,) if plain else KINDS)
    begin = time.perf_counter()
    busy = await sampled(handle, groups)
    between = time.perf_counter()
    print(f"{len(busy)} rows of {tokens} tokens in batches of 32: {rows * tokens / (between - begin):.0f} tokens/s")
    found = await replayed(handle, busy)
    print(f"replay: {rows * tokens / (time.perf_counter() - between):.0f} tokens/s")
    report("drawn again", found, busy)
    # One at a time, by its seed, where a row that comes out otherwise is explained by where its replay differs.
    alone = [(await sampled(handle, [group]))[0] for group in groups[:again]]
    same = [one.token_ids == other.token_ids for one, other in zip(alone, busy, strict=False)]
    print(f"sampled again alone with its seed, n = 1: {sum(same)} of {again} rows exact")
    await handle.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--again", type=int, default=64)
    parser.add_argument("--plain", action="store_true", help="temperature 1 only")
    parser.add_argument("--demo", action="store_true", help="the embedded model, which is trained")
    parser.add_argument("--kv-bits", type=int, choices=[8], help="keep keys and values in so many bits")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(given.rows, given.tokens, given.again, Path(folder), given.plain, given.demo, given.kv_bits))
