"""What a trainer asks for in one step: prompts with several samples each, and an adapter that is new in every step."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from benchmarks.model import random_texts
from tests.support.tiny_models import random_adapter, save_adapter

RANK = 16


@dataclass(frozen=True, slots=True)
class Job:
    """`prompts` of `prompt_tokens` ids with `n` samples of `tokens` each, asked of the model in `model`."""

    model: Path
    prompts: int = 32
    n: int = 8
    prompt_tokens: int = 256
    tokens: int = 128

    @property
    def rows(self) -> int:
        return self.prompts * self.n

    @property
    def sampled(self) -> int:
        return self.rows * self.tokens

    @property
    def read(self) -> int:
        """Prompt tokens, each prompt once; its last token is the input of the first step."""
        return self.prompts * (self.prompt_tokens - 1)

    def ids(self, number: int) -> list[list[int]]:
        """The prompts of step `number`: other ones in every step, as a trainer's are, so that none was read before."""
        tokenizer = Tokenizer.from_file(str(self.model / "tokenizer.json"))
        # A token has at least one letter.
        texts = random_texts(self.prompts, 4 * self.prompt_tokens, seed=number)
        found = [tokenizer.encode(text).ids[: self.prompt_tokens] for text in texts]
        if short := [ids for ids in found if len(ids) < self.prompt_tokens]:
            raise RuntimeError(f"{len(short)} texts have fewer than {self.prompt_tokens} tokens.")
        return found

    def texts(self, number: int) -> list[str]:
        """The same prompts as texts, for a server that takes no ids; it may make a few tokens more or fewer of one."""
        tokenizer = Tokenizer.from_file(str(self.model / "tokenizer.json"))
        return [tokenizer.decode(ids) for ids in self.ids(number)]

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "prompts": self.prompts,
            "samples of each": self.n,
            "prompt tokens": self.prompt_tokens,
            "tokens of a row": self.tokens,
        }


@dataclass
class Adapter:
    """A LoRA of rank 16 on every linear layer, as a trainer holds it: float32 tensors and PEFT's configuration."""

    model: Path
    tensors: dict[str, np.ndarray]
    config: dict[str, Any]
    steps: int = field(default=0)

    @classmethod
    def of(cls, model: Path, seed: int = 1, *, dora: bool = False) -> Adapter:
        return cls(model, *random_adapter(linear_layers(model), RANK, seed, dora=dora))

    @property
    def megabytes(self) -> float:
        return sum(tensor.nbytes for tensor in self.tensors.values()) / 1e6

    def trained(self) -> dict[str, np.ndarray]:
        """The tensors after one more step: other content, so that no push is a repetition."""
        self.steps += 1
        name = min(self.tensors)
        moved = self.tensors[name].copy()
        moved.flat[0] += self.steps / 65536
        return {**self.tensors, name: moved}

    def save_for_mlx_lm(self, folder: Path, seed: int = 1) -> Path:
        """A directory with the same adapter as mlx-lm reads it."""
        return save_adapter(folder, *random_adapter(linear_layers(self.model), RANK, seed, kind="mlx"))

    def save_for_peft(self, folder: Path) -> Path:
        return save_adapter(folder, self.tensors, self.config)


def linear_layers(model: Path) -> dict[str, tuple[int, int]]:
    """Parameter path → (out, in) of every linear layer, out of the header of the weights: numpy has no bfloat16."""
    with (model / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return {
        name.removesuffix(".weight"): (entry["shape"][0], entry["shape"][1])
        for name, entry in sorted(header.items())
        if name.endswith(".weight") and len(entry["shape"]) == 2 and "embed" not in name and "lm_head" not in name
    }
