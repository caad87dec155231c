"""`--kv-bits 8` against none: what it does to log-probabilities, bytes of KV per token, and decode throughput.

`python -m benchmarks.studies.kv_bits [--rounds 5] [--rows 32] [--json]`. Rows are sampled with keys and values in 8
bits, from the embedded trained model and from the random one of the other benchmarks, and scored with and without; the
difference of the two is the effect, that of the first to what was sampled how far two paths in 8 bits are apart.
Decoding is measured on the random model: both engines in one process, in turns, a ratio within each round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollout_server.machine.blas import load_fast_blas

if TYPE_CHECKING:
    import numpy as np

    from benchmarks.contenders.engine import Engine
    from rollout_server.rollout import Rollout

DEMO = Path(__file__).parents[2] / "rollout_server" / "demo" / "model"
PROMPT_TOKENS = (100, 500)
STEPS = 24


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.kv_bits", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each engine, taken in turns")
    parser.add_argument("--rows", type=int, default=32, help="sequences that decode together")
    parser.add_argument("--tokens", type=int, default=128, help="tokens sampled in each row whose effect is measured")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, progress on stderr")
    options = parser.parse_args()
    for name in ("rounds", "rows", "tokens"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    print(load_fast_blas(), file=sys.stderr)  # Before anything imports mlx, hence the imports inside the functions.

    from benchmarks.model import write_model

    with tempfile.TemporaryDirectory() as folder:
        random = write_model(Path(folder) / "qwen3-33m")
        models = {"embedded, trained": DEMO, "33M, random": random}
        report = {
            "effect": {name: effect(path, options.rows, options.tokens) for name, path in models.items()},
            "decode": [decode(random, options.rows, length, options.rounds) for length in PROMPT_TOKENS],
        }
    print(json.dumps(report, indent=2) if options.json else table(report))
    return 0


def effect(path: Path, rows: int, tokens: int) -> dict[str, Any]:
    """Absolute differences of log-probabilities (nats) over all sampled tokens, and bytes of KV per token."""
    import numpy as np

    from benchmarks.contenders.engine import Engine

    with Engine(path, rows, kv_bits=8) as packed, Engine(path, rows) as plain:
        sampled = packed.rollouts(groups_of(rows, tokens, packed.handle.info.vocab_size))
        ours, theirs = (scored(engine, sampled) for engine in (packed, plain))
        sizes = [engine.handle.info.kv_bytes_per_token for engine in (plain, packed)]
    recorded = np.concatenate([np.array(row.logprobs) for row in sampled])
    return {
        "tokens": len(recorded),
        "of_8_bits": described(np.abs(ours - theirs)),
        "between_paths": described(np.abs(ours - recorded)),
        "bytes_per_token": sizes,
    }


def groups_of(rows: int, tokens: int, vocabulary: int) -> list[Any]:
    """Rows of temperature 1 behind random prompts of 8 to 128 tokens."""
    import numpy as np

    from rollout_server.rollout import PolicyAddress, RolloutRequest, SamplingParams

    generator = np.random.default_rng(0)
    return [
        RolloutRequest(
            id="bench",
            prompt_ids=tuple(generator.integers(0, vocabulary, size=int(generator.integers(8, 129))).tolist()),
            sampling=SamplingParams(max_tokens=tokens, ignore_eos=True),
            policy=PolicyAddress("base"),
            prompt_index=row,
            seeds=(row,),
        )
        for row in range(rows)
    ]


def scored(engine: Engine, rows: list[Rollout]) -> np.ndarray:
    """float64 [tokens of all rows], in their order."""
    import numpy as np

    from rollout_server.engine.messages.scoring import Score
    from rollout_server.rollout import PolicyAddress

    sequences = tuple(row.prompt_ids + row.token_ids for row in rows)
    starts = tuple(len(row.prompt_ids) for row in rows)
    score = Score(engine.handle.new_id("score"), PolicyAddress("base"), sequences, starts)
    return np.concatenate([np.array(found.logprobs) for found in engine.wait_for(engine.handle.score(score)).sequences])


def described(gaps: np.ndarray) -> dict[str, float]:
    return {"mean": float(gaps.mean()), "max": float(gaps.max())}


def decode(path: Path, rows: int, length: int, rounds: int) -> dict[str, Any]:
    """Tokens a second without and with 8 bits, and the median of the rounds' ratios."""
    from benchmarks.contenders.engine import EngineDecode
    from benchmarks.measure import Load, interleave
    from benchmarks.model import random_prompts

    load, prompts = Load(rows, length, STEPS), random_prompts(rows, length)
    with ExitStack() as engines:
        both = [engines.enter_context(EngineDecode(path, prompts, load, kv_bits=bits)) for bits in (None, 8)]
        for engine, name in zip(both, ("off", "8 bits"), strict=True):
            engine.name = name
        plain, packed = interleave(both, rounds, lambda line: print(line, file=sys.stderr, flush=True))
    ratios = sorted(one / other for one, other in zip(packed.rates, plain.rates, strict=True))
    return {
        "prompt_tokens": length,
        "off": round(plain.median, 1),
        "packed": round(packed.median, 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def table(report: dict[str, Any]) -> str:
    lines = []
    for name, found in report["effect"].items():
        plain, packed = found["bytes_per_token"]
        (mean, most), (apart, far) = (found[key].values() for key in ("of_8_bits", "between_paths"))
        lines += [
            f"{name}: {found['tokens']} tokens; effect mean {mean:.1e}, max {most:.1e}; between two paths in 8 bits "
            f"mean {apart:.1e}, max {far:.1e}; {packed} bytes a token, off {plain} ({plain / packed:.2f}×)"
        ]
    for found in report["decode"]:
        lines += [
            f"prompts of {found['prompt_tokens']}: off {found['off']} tok/s, 8 bits {found['packed']}, "
            f"ratio {found['ratio']} {found['ratios']}"
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
