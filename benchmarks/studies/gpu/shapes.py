"""Random models of the shapes that are measured, in bfloat16, and how large a measurement of each is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3

from benchmarks.model import widen_tokenizer
from tests.support.tiny_models import write_tokenizer

COMMON: dict[str, Any] = {
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
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 16384,
    },
}


@dataclass(frozen=True, slots=True)
class Size:
    """What is measured at one shape; `larger` is the shape whose weights count for more."""

    shape: str
    larger: str
    prompts: int = 32
    prompt_tokens: int = 256
    tokens: int = 128
    few: int = 32
    rows: int = 256
    many: int = 512
    short: int = 100
    """Prompt tokens where the length of rows is not the question."""
    columns: tuple[int, ...] = (128, 768, 1024, 4096)
    asked_columns: tuple[int, int] = (768, 1024)
    """Where a step's time is asked for, and where the share of bandwidth is."""
    steps: int = 48
    window_s: float = 6.0


SIZES = {
    "0.6B": Size("0.6B", "4B"),
    "tiny": Size(
        "tiny",
        "tiny",
        prompts=4,
        prompt_tokens=24,
        tokens=8,
        few=4,
        rows=32,
        many=48,
        short=20,
        columns=(32, 48),
        asked_columns=(32, 48),
        steps=6,
        window_s=2.0,
    ),
}


def write_model(directory: Path, name: str, dtype: mx.Dtype = mx.bfloat16) -> Path:
    """A random model of this shape, as mlx-lm saves one, with a tokenizer that has a text for every id."""
    shape = COMMON | SHAPES[name]
    directory.mkdir()
    special = write_tokenizer(directory)
    widen_tokenizer(directory / "tokenizer.json", shape["vocab_size"])
    config = {
        **shape,
        "eos_token_id": special["<|end|>"],
        "pad_token_id": special["<|pad|>"],
        "dtype": str(dtype).removeprefix("mlx.core."),
    }
    (directory / "config.json").write_text(json.dumps(config))
    mx.random.seed(0)
    model = qwen3.Model(qwen3.ModelArgs.from_dict(shape))
    model.set_dtype(dtype)
    weights: dict[str, mx.array] = {
        path: array for path, array in dict(tree_flatten(model.parameters())).items() if "lm_head" not in path
    }
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "mlx"})
    mx.clear_cache()
    return directory
