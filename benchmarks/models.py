"""The model every benchmark runs: a random Qwen3 of 33 million parameters, float32, vocabulary 16k."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.tiny_models import build

VOCAB_SIZE = 16384
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def write_model(directory: Path) -> Path:
    """Write the benchmark model (134 MB) into `directory` and return it. About two seconds."""
    return build("qwen3", directory, **SHAPE)


def random_prompts(rows: int, length: int, seed: int = 0) -> list[list[int]]:
    """`rows` different prompts of `length` token ids."""
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, size=(rows, length)).tolist()
