"""Label scores of many sequences, and of samples of one prompt, in tokens a second.

`python -m benchmarks.studies.rewards [--rounds 5] [--sequences 256] [--tokens 200] [--json]`. Three ways in turns, a
ratio within each round: the engine's scoring queue with a head on the states; one bare forward of the same tokens, in
parts as large as the engine's; and transformers on the same CPU, where torch is installed. Then 16 samples of 32 tokens
behind one prompt, against 16 times one of them alone. The model is the random one of the other benchmarks with a head.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rollout_server.machine.blas import load_fast_blas

load_fast_blas()

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

from benchmarks.model import SHAPE, random_prompts, write_model  # noqa: E402
from tests.support.engine.driver import Driver  # noqa: E402

SAMPLES, SAMPLED = 16, 32
PREFILL = 512


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.rewards", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each way, taken in turns")
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=200, help="of each sequence")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of the prompt that the samples share")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        found = measure(write_scorer(Path(place)), options)
    if options.json:
        print(json.dumps(found))
        return 0
    for name, value in found.items():
        print(f"{name:44} {value:,.2f}" if value < 100 else f"{name:44} {value:,.0f}")
    return 0


def write_scorer(directory: Path) -> Path:
    """The benchmarks' model with a head of one label in the place of its output layer, as transformers names it."""
    write_model(directory)
    width = int(SHAPE["hidden_size"])
    head = np.random.default_rng(1).normal(size=(1, width)).astype(np.float32) / width**0.5
    path = directory / "model.safetensors"
    save_file({**load_file(path), "score.weight": head}, path)
    config = json.loads((directory / "config.json").read_text())
    config |= {"architectures": ["Qwen3ForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def measure(directory: Path, options: argparse.Namespace) -> dict[str, float]:
    driver = Driver.start(directory, clock=time.perf_counter, prefill_tokens=PREFILL)
    rows = random_prompts(options.sequences, options.tokens)
    ways: dict[str, Callable[[], Any]] = {
        "engine": lambda: driver.classify(rows),
        "forward": lambda: bare(driver, rows),
    }
    if find_spec("torch") is not None:
        ways["transformers"] = by_transformers(directory, rows)
    prompt, *tails = random_prompts(1, options.prompt) + random_prompts(SAMPLES, SAMPLED, seed=1)
    group = [prompt + tail for tail in tails]
    ways |= {"group": lambda: driver.classify(group), "one": lambda: driver.classify(group[:1])}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round in range(options.rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if round:  # The first one warms up.
                seconds[name].append(time.perf_counter() - began)
        print(f"round {round} of {options.rounds}", file=sys.stderr)
    tokens = options.sequences * options.tokens
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    found = {
        f"{name}, tokens/s": tokens / middle[name] for name in ("engine", "forward", "transformers") if name in ways
    }
    found |= {
        f"engine / {name}": statistics.median(b / a for a, b in zip(seconds["engine"], seconds[name], strict=True))
        for name in ("forward", "transformers")
        if name in ways
    }
    share = zip(seconds["group"], seconds["one"], strict=True)
    return found | {
        f"{SAMPLES} samples / {SAMPLES} whole reads": statistics.median(a / (SAMPLES * b) for a, b in share)
    }


def bare(driver: Driver, rows: list[list[int]]) -> None:
    """The same tokens through the layers alone, as many sequences at once as the engine reads."""
    model, at_once = driver.model, driver.reader.limit
    for at in range(0, len(rows), at_once):
        mx.eval(model.hidden(mx.array(rows[at : at + at_once]), model.make_caches()))


def by_transformers(directory: Path, rows: list[list[int]]) -> Callable[[], Any]:
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    parts = torch.tensor(rows).split(32)

    def read() -> list[Any]:
        with torch.no_grad():
            return [model(input_ids=part).logits for part in parts]

    return read


if __name__ == "__main__":
    raise SystemExit(main())
