"""Decode on a GPU in bfloat16: random models of the shape of Qwen3-0.6B and 4B, against the bare loop and transformers.

    python -m benchmarks.studies.gpu [--models 0.6B 4B] [--rows 1 32 256] [--rounds 5] [--json FILE]

Prints tokens per second, each contender's ratio to the bare loop, and how much of the device's measured bandwidth the
weights and KV that a step has to read take up. `generate` of transformers runs in the same way if torch sees a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rollout_server.machine.blas import load_fast_blas

load_fast_blas()

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.models import qwen3  # noqa: E402
from mlx_lm.utils import load_model  # noqa: E402

from benchmarks.contenders.bare import BareLoop, UnmaskedLoop  # noqa: E402
from benchmarks.contenders.engine import TOP_P, EngineDecode  # noqa: E402
from benchmarks.contenders.mlx_lm import BatchGeneratorDecode  # noqa: E402
from benchmarks.measure import Contender, Load, interleave  # noqa: E402
from tests.support.tiny_models import write_tokenizer  # noqa: E402

COMMON = {
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 40960,
    "rope_scaling": None,
}
SHAPES: dict[str, dict[str, Any]] = {
    "0.6B": {"hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072, "num_attention_heads": 16},
    "4B": {"hidden_size": 2560, "num_hidden_layers": 36, "intermediate_size": 9728, "num_attention_heads": 32},
}


def write_model(directory: Path, shape: dict[str, Any]) -> Path:
    """A random model of this shape, bfloat16, as mlx-lm saves one."""
    directory.mkdir()
    special = write_tokenizer(directory)
    config = {**COMMON, **shape, "eos_token_id": special["<|end|>"], "dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(config))
    mx.random.seed(0)
    model = qwen3.Model(qwen3.ModelArgs.from_dict({**COMMON, **shape}))
    model.set_dtype(mx.bfloat16)
    weights = {name: array for name, array in tree_flatten(model.parameters()) if "lm_head" not in name}
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "mlx"})
    return directory


def bandwidth() -> float:
    """Bytes a second that a large addition reads and writes; the best of five."""
    values = mx.random.normal((1 << 28,))
    mx.eval(values)
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        mx.eval(values + 1)
        best = min(best, time.perf_counter() - begin)
    return 2 * values.nbytes / best


class TransformersDecode:
    """`generate` of transformers, sampling at temperature 1, at its defaults; of its time the prefill is taken off."""

    name = "transformers generate"

    def __init__(self, shape: dict[str, Any], prompts: list[list[int]], load: Load) -> None:
        import torch
        from transformers import Qwen3Config, Qwen3ForCausalLM

        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"):
            self._model = Qwen3ForCausalLM(Qwen3Config(**{**COMMON, **shape})).eval()
        self._ids = torch.tensor(prompts, device="cuda")
        self._load = load
        self._torch = torch

    def run(self) -> tuple[int, float]:
        one, all = self._generate(1), self._generate(self._load.steps + 1)
        return self._load.tokens, all - one

    def _generate(self, tokens: int) -> float:
        self._torch.cuda.synchronize()
        begin = time.perf_counter()
        self._model.generate(
            self._ids,
            attention_mask=self._torch.ones_like(self._ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=True,
            top_k=0,
            eos_token_id=None,
            pad_token_id=0,
        )
        self._torch.cuda.synchronize()
        return time.perf_counter() - begin


def sees_torch() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


def contenders(path: Path, prompts: list[list[int]], load: Load, stack: ExitStack) -> Iterator[Contender]:
    model, _ = load_model(path)
    yield BareLoop(model, prompts, load, compiled=False)
    yield BareLoop(model, prompts, load, compiled=True)
    yield UnmaskedLoop(model, prompts, load)
    yield BatchGeneratorDecode(model, prompts, load)
    yield stack.enter_context(EngineDecode(path, prompts, load))
    yield stack.enter_context(EngineDecode(path, prompts, load, kind=TOP_P))
    yield stack.enter_context(EngineDecode(path, prompts, load, compile_decode=False))


def measure(name: str, rows: int, rounds: int, speed: float, torch: bool) -> dict[str, Any]:
    load = Load(rows, 100, 64)
    prompts = np.random.default_rng(0).integers(0, COMMON["vocab_size"], size=(rows, 100)).tolist()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        path = write_model(Path(folder) / name, SHAPES[name])
        each = list(contenders(path, prompts, load, stack))
        results = interleave(each, rounds)
        weights = (path / "model.safetensors").stat().st_size
    del each
    gc.collect()
    mx.clear_cache()
    if torch:
        results += interleave([TransformersDecode(SHAPES[name], prompts, load)], rounds)
    kv = 2 * 2 * COMMON["num_key_value_heads"] * COMMON["head_dim"] * SHAPES[name]["num_hidden_layers"]
    step = weights + rows * (load.prompt_tokens + load.steps / 2) * kv
    bare = results[0].median
    found: dict[str, Any] = {"model": name, "rows": rows, "step_bytes": step, "contenders": {}}
    print(f"\nQwen3-{name} shape, {rows} rows: {step / 1e9:.2f} GB a step, {100 * weights / step:.0f} % of it weights")
    for result in results:
        share = step * result.median / rows / speed
        found["contenders"][result.name] = {"tok_s": result.rates, "of_bare": result.median / bare, "bandwidth": share}
        print(
            f"  {result.name:28s} {result.median:9.0f} tok/s {1e3 * rows / result.median:8.2f} ms/step "
            f"{result.median / bare:5.2f} of bare {100 * share:5.1f} % of bandwidth",
            flush=True,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 32, 256])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if mx.default_device() == mx.cpu:
        raise SystemExit(
            "There is no GPU that MLX can use; `python -m benchmarks.sections.engine.decode` measures on a CPU."
        )
    speed, torch = bandwidth(), sees_torch()
    info = {name: str(value) for name, value in mx.device_info().items()}
    print(
        f"{info.get('device_name', mx.default_device())}: {speed / 1e12:.2f} TB/s; medians of {options.rounds} rounds"
    )
    found = [measure(name, rows, options.rounds, speed, torch) for name in options.models for rows in options.rows]
    if options.json:
        options.json.write_text(json.dumps({"device": info, "bandwidth": speed, "runs": found}, indent=1))


if __name__ == "__main__":
    main()
