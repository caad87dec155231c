"""What a trainer's first batch waits for, and its second: with the shapes run at the start, and without.

`python -m benchmarks.studies.first_batch [--model DIR] [--warm off]`, a process each, since what one engine has
compiled the next one finds. Seconds until the engine is ready, then tokens per second, prefill included, of two batches
on the base and of two on a LoRA of rank 16 that was pushed before. Through the engine's handle: without HTTP, a part of
the job.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rollout_server.machine.blas import load_fast_blas

if TYPE_CHECKING:
    from benchmarks.contenders.engine import Engine


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.first_batch", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model", type=Path, help="a model's directory; the 33M-parameter one if none is given")
    parser.add_argument("--warm", choices=("on", "off"), default="on")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument(
        "--compile", action="store_true", help="trace decode steps on a CPU too, which is no gain there"
    )
    options = parser.parse_args()
    print(load_fast_blas(), file=sys.stderr)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as directory:
        run(options, Path(directory))
    return 0


def run(options: argparse.Namespace, directory: Path) -> None:
    from adapters.spec import place_of
    from benchmarks.contenders.engine import Engine
    from benchmarks.model import write_model
    from rollout_server.engine.messages.versions import Publish
    from tests.support.adapter_files import make

    path = options.model or write_model(directory / "model")
    began = time.perf_counter()
    compiles = True if options.compile else None
    rows = options.prompts * options.samples
    with Engine(path, rows, warm=options.warm == "on", compile_decode=compiles) as engine:
        info = engine.handle.info
        print(f"{info.device}, {rows} rows: ready after {time.perf_counter() - began:.1f} s with --warm {options.warm}")
        linear = {
            name: shape
            for name, shape in info.layers.items()
            if place_of(shape) == "linear" and info.vocab_size not in shape
        }
        engine.wait_for(engine.handle.publish(Publish("bench", "policy", make(linear, 1, rank=16))))
        for policy in ("base", "policy"):
            for number, batch in enumerate(("first", "second")):
                print(f"{policy}, {batch} batch: {batch_rate(engine, policy, number, options):,.0f} tok/s", flush=True)


def batch_rate(engine: Engine, policy: str, number: int, options: argparse.Namespace) -> float:
    """Tokens per second of one batch, whose prompts are somewhat shorter the second time."""
    import numpy as np

    from rollout_server.rollout import PolicyAddress, RolloutRequest, SamplingParams

    lengths = [options.prompt_tokens - 3 * number - index % 16 for index in range(options.prompts)]
    rng = np.random.default_rng(number)
    groups = [
        RolloutRequest(
            id="bench",
            prompt_ids=tuple(rng.integers(0, engine.handle.info.vocab_size, max(1, length)).tolist()),
            sampling=SamplingParams(max_tokens=options.max_tokens, ignore_eos=True),
            policy=PolicyAddress(policy),
            n=options.samples,
            prompt_index=index,
            seeds=tuple(range(options.samples)),
        )
        for index, length in enumerate(lengths)
    ]
    began = time.perf_counter()
    tokens = sum(len(rollout.token_ids) for rollout in engine.rollouts(groups))
    return tokens / (time.perf_counter() - began)


if __name__ == "__main__":
    raise SystemExit(main())
