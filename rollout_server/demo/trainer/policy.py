"""The trainer's own copy of the policy: the base in float32 with mlx-lm's LoRA layers on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from .grpo import Packed, grpo_loss, token_logprobs
from .settings import Settings


class Policy:
    """What is trained. The arrays in `tensors` are what the server gets; nothing else is shared with it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # mlx-lm would look for the name on the Hub.
        if not (settings.model / "config.json").is_file():
            raise FileNotFoundError(f"{settings.model} holds no config.json: give the directory of the server's base.")
        loaded = mlx_lm.load(str(settings.model))
        self.model, self.tokenizer = loaded[0], loaded[1]
        self.model.set_dtype(mx.float32)
        self.model.freeze()
        self._lora = {"rank": settings.rank, "scale": settings.scale, "dropout": 0.0}
        mx.random.seed(settings.seed)
        linear_to_lora_layers(self.model, len(self.model.layers), self._lora)
        mx.eval(self.model.parameters())
        self._optimizer = optim.Adam(settings.learning_rate, betas=[0.9, 0.95], bias_correction=True)

    @property
    def tensors(self) -> dict[str, mx.array]:
        """The LoRA tensors under mlx-lm's own names: `….lora_a` [in, rank] and `….lora_b` [rank, out], float32."""
        return dict(tree_flatten(self.model.trainable_parameters()))

    @property
    def config(self) -> dict[str, Any]:
        """adapter_config.json as mlx-lm writes it."""
        return {"fine_tune_type": "lora", "num_layers": len(self.model.layers), "lora_parameters": self._lora}

    def answer(self, token_ids: np.ndarray, finish_reason: str) -> tuple[str, bool]:
        """The text of sampled tokens, and whether the end token closed it."""
        ended = finish_reason == "stop"
        return self.tokenizer.decode(token_ids[:-1].tolist() if ended else token_ids.tolist()), ended

    def logprobs(self, packed: Packed) -> np.ndarray:
        """float32 [N]: log-probabilities of the sampled tokens under the weights as they are now."""
        return np.array(token_logprobs(self.model, packed))

    def update(self, packed: Packed, advantages: np.ndarray) -> None:
        """One optimiser step. `advantages` is float32 [N]."""
        weights = mx.array(advantages)

        def loss() -> mx.array:
            return grpo_loss(self.model, packed, weights, self._settings.clip)

        _, gradients = nn.value_and_grad(self.model, loss)()
        gradients, _ = optim.clip_grad_norm(gradients, self._settings.max_norm)
        self._optimizer.update(self.model, gradients)
        mx.eval(self.model.trainable_parameters(), self._optimizer.state)

    def save(self, directory: Path) -> None:
        """Writes adapters.safetensors and adapter_config.json, which `mlx_lm.load(adapter_path=…)` reads."""
        directory.mkdir(parents=True, exist_ok=True)
        mx.save_safetensors(str(directory / "adapters.safetensors"), self.tensors)
        (directory / "adapter_config.json").write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
