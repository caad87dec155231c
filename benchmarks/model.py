"""The model every benchmark runs: a random Qwen3 of 33 million parameters, float32, vocabulary 16k."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel

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
    from tests.support.tiny_models import build  # It imports mlx, before which the BLAS is loaded.

    build("qwen3", directory, **SHAPE)
    widen_tokenizer(directory / "tokenizer.json")
    return directory


def widen_tokenizer(path: Path, size: int = VOCAB_SIZE) -> None:
    """Give every id of the model a text, as real vocabularies do: mlx-lm's server cannot detokenise an id without one.
    The special tokens keep their ids; the new tokens are pairs of symbols, and behind them pairs with a third."""
    small = Tokenizer.from_file(str(path))
    vocabulary = small.get_vocab(with_added_tokens=True)
    merges = [
        tuple(pair) if isinstance(pair, list) else tuple(pair.split(" "))
        for pair in json.loads(path.read_text("utf-8"))["model"]["merges"]
    ]
    alphabet = sorted(ByteLevel.alphabet(), key=lambda symbol: (not symbol.isalnum(), symbol))
    pairs = [(one, other) for one in alphabet for other in alphabet]
    for one, other in itertools.chain(pairs, ((one + other, third) for third in alphabet for one, other in pairs)):
        if len(vocabulary) == size:
            break
        if one + other not in vocabulary:
            vocabulary[one + other] = len(vocabulary)
            merges.append((one, other))
    small.model = models.BPE(vocab=vocabulary, merges=merges)
    small.save(str(path))


def random_prompts(rows: int, length: int, seed: int = 0, vocabulary: int = VOCAB_SIZE) -> list[list[int]]:
    """`rows` different prompts of `length` token ids below `vocabulary`."""
    return np.random.default_rng(seed).integers(0, vocabulary, size=(rows, length)).tolist()


def random_texts(rows: int, length: int, seed: int = 0) -> list[str]:
    """`rows` different prompts of `length` letters and digits; two of these make about one token."""
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz0123456789"))
    return ["".join(letters[row]) for row in np.random.default_rng(seed).integers(0, len(letters), (rows, length))]
