"""What the second turn of a conversation reads, and what short prompts cost that are read together.

`python -m benchmarks.studies.recurrent [--families mamba2 qwen3_next] [--rounds 5] [--tokens 2000] [--json]`. A prompt
is read, a reply sampled, and the conversation asked to go on, to `--tokens` in all; with the prefix cache, and without,
in turns. Told are the tokens that the second turn reads as a share of the first's, the time up to the second turn's
first token as a share of the first's, how far its log-probabilities are from those without, and what one state takes.
Then 32 prompts of 100 tokens, read together where the class allows it and one at a time. Models are random and small.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from rollout_server.machine.blas import load_fast_blas

load_fast_blas()

import mlx.core as mx  # noqa: E402

from rollout_server.engine.kv_cache.mlx_caches import MlxCacheKV  # noqa: E402
from rollout_server.engine.messages.options import EngineOptions  # noqa: E402
from rollout_server.engine.model.load import load  # noqa: E402
from rollout_server.engine.model.resident import ResidentModel  # noqa: E402
from tests.support.engine.driver import Driver, prompts_of  # noqa: E402
from tests.support.tiny_models import build  # noqa: E402

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
SIZES_OF: dict[str, dict[str, int]] = {"mamba2": {"num_heads": 8, "head_dim": 32, "state_size": 32}, "qwen3_next": {}}
REPLY, ASKED, IDS = 60, 60, 286
"""Tokens of the first reply and of the second question; ids of the vocabulary that are text."""
SHORT, MANY = 100, 32
PREFILL = 512


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.recurrent", description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", default=list(SIZES_OF), help="tiny models of tests/support")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each way, taken in turns")
    parser.add_argument("--tokens", type=int, default=2000, help="of the conversation when its second reply begins")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    options = parser.parse_args()
    found: dict[str, float] = {}
    for family in options.families:
        with tempfile.TemporaryDirectory() as place:
            path = build(family, Path(place), **SIZES, **SIZES_OF.get(family, {}))
            model = load(EngineOptions(str(path), family, prefill_tokens=PREFILL))
            measured = conversation(path, model, options) | short_prompts(path, model, options)
            found |= {f"{family}: {name}": value for name, value in measured.items()}
    if options.json:
        print(json.dumps(found))
        return 0
    for name, value in found.items():
        print(f"{name:64} {value:,.4g}")
    return 0


def conversation(path: Path, model: ResidentModel, options: argparse.Namespace) -> dict[str, float]:
    read, apart, took, plain = [], [], [], []
    state = 0
    for number in range(options.rounds + 1):
        seconds: dict[bool, tuple[float, float]] = {}
        logprobs: dict[bool, list[float]] = {}
        for kept in (True, False):
            driver = Driver.start(path, model, clock=time.perf_counter, prefix_cache=kept, prefill_tokens=PREFILL)
            (prompt,) = prompts_of([options.tokens - REPLY - ASKED], IDS, seed=number)
            (first,) = driver.generate([prompt], seed=1, max_tokens=REPLY, ignore_eos=True)
            before = driver.batches.prefilled
            state = max(state, driver.status.prefix.nbytes // 2)
            again = [*prompt, *first.token_ids, *prompts_of([ASKED], IDS, seed=100 + number)[0]]
            (second,) = driver.generate([again], seed=2, max_tokens=8, ignore_eos=True)
            seconds[kept] = first.timings.prefill_ms / 1e3, second.timings.prefill_ms / 1e3
            logprobs[kept] = list(second.logprobs)
            if kept:
                read.append((driver.batches.prefilled - before) / before)
        if number:  # The first one warms up.
            took.append(seconds[True][1] / seconds[True][0])
            plain.append(seconds[False][1] / seconds[False][0])
        apart.append(max(abs(a - b) for a, b in zip(*logprobs.values(), strict=True)))
        print(f"{model.info.model_type}: round {number} of {options.rounds}", file=sys.stderr)
    return {
        "tokens read, second turn / first": max(read),
        "prefill time, second turn / first": statistics.median(took),
        "prefill time without kept states, second / first": statistics.median(plain),
        "largest difference of log-probabilities": max(apart),
        "bytes of a kept state": state,
    }


def short_prompts(path: Path, model: ResidentModel, options: argparse.Namespace) -> dict[str, float]:
    """Tokens of many short prompts in a second, together and one at a time."""
    store = model.make_store()
    alone = replace(model, make_store=lambda: MlxCacheKV(model.make_caches, row_cells=0))
    ways = {"together": model, "one at a time": alone}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(options.rounds + 1):
        prompts = prompts_of([SHORT + at % 16 for at in range(MANY)], IDS, seed=number)
        for name, way in ways.items():
            driver = Driver.start(path, way, clock=time.perf_counter, prefix_cache=False, prefill_tokens=PREFILL)
            mx.synchronize()
            began = time.perf_counter()
            driver.generate(prompts, max_tokens=1, ignore_eos=True)
            if number:
                seconds[name].append(time.perf_counter() - began)
    tokens = sum(len(prompt) for prompt in prompts)
    found = {f"short prompts {name}, tokens/s": tokens / statistics.median(taken) for name, taken in seconds.items()}
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    padded = isinstance(store, MlxCacheKV) and store.pads
    return found | {"short prompts together / one at a time": statistics.median(ratios) if padded else 1.0}


if __name__ == "__main__":
    raise SystemExit(main())
