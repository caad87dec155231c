"""PEFT on transformers, float32: adapters as it saves them, and the log-probabilities it gives."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from tests.support.peers import families

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 7},
    "rslora": {"r": 6, "lora_alpha": 5, "use_rslora": True},
    "dora": {"r": 3, "lora_alpha": 8, "use_dora": True},
}
STRENGTH = 0.4
"""‖ΔW · x‖ is about this much of ‖x‖."""


def adapted(
    directory: Path,
    seed: int = 1,
    grid: torch.dtype = torch.float32,
    *,
    auto: type = AutoModelForCausalLM,
    num_labels: int | None = None,
    **options: Any,
) -> PeftModel:
    """The family's model, made by `auto`, with a random adapter of these fields of `LoraConfig`, no part of it zero,
    and whole modules beside it that are not the base's."""
    config = LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": "all-linear", **options})
    of_labels = {} if num_labels is None else {"num_labels": num_labels}
    model = get_peft_model(families.load(directory, auto, **of_labels), config)
    generator = torch.Generator().manual_seed(seed)
    scale = max(layer.scaling["default"] for layer in model.modules() if isinstance(layer, LoraLayer))
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            part = re.search(r"\.(lora_\w+|modules_to_save)\.", name)
            if part is None:
                continue
            value = torch.randn(parameter.shape, generator=generator)
            if ".score." in name:
                value *= parameter.shape[-1] ** -0.5  # Nothing of the base's: transformers draws a new one.
            elif part[1] == "modules_to_save":
                value = parameter + 0.3 * parameter.std() * value
            elif part[1] == "lora_magnitude_vector":
                value = parameter * (0.3 * value).exp()
            elif part[1] in ("lora_B", "lora_embedding_B"):
                value *= STRENGTH / (scale * parameter.shape[-1] ** 0.5)
            elif part[1] == "lora_A":
                value *= parameter.shape[-1] ** -0.5
            else:
                value *= 0.3
            parameter.copy_(value.to(grid))
    return model.eval()


def unpack(exported: bytes, adapter: Path, name: str = "adapter_model.safetensors") -> Path:
    """The directory that a trainer makes of an exported file, whose configuration is in its metadata."""
    adapter.mkdir(parents=True)
    (adapter / name).write_bytes(exported)
    with safe_open(adapter / name, "numpy") as file:
        (adapter / "adapter_config.json").write_text(file.metadata()["adapter_config"])
    return adapter


def reloaded(directory: Path, adapter: Path) -> PeftModel:
    """What PEFT makes of an adapter directory on a fresh copy of the base."""
    return PeftModel.from_pretrained(families.load(directory), adapter).eval()


def embeddings(model: torch.nn.Module, sequences: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """Hidden states after the final norm, pooled: `last` and `mean`, both float32 [sequences, width]."""
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    trunk = getattr(whole, whole.base_model_prefix)
    with torch.no_grad():
        states = [trunk(input_ids=torch.tensor([list(ids)])).last_hidden_state[0].float() for ids in sequences]
    return {
        "last": np.stack([each[-1].numpy() for each in states]),
        "mean": np.stack([each.mean(0).numpy() for each in states]),
    }


def scores(model: torch.nn.Module, sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """[sequences, labels] float32: what a classifier gives for each, read alone."""
    with torch.no_grad():
        found = [model(input_ids=torch.tensor([list(ids)])).logits[0].float().numpy() for ids in sequences]
    return np.stack(found)


class InFloat64(TorchFunctionMode):
    """Within it what a model's code does in float32, whatever its own precision is, is done in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args = [torch.float64 if value is torch.float32 else value for value in args]
        named = {k: torch.float64 if value is torch.float32 else value for k, value in (kwargs or {}).items()}
        return func(*args, **named)


def exact_logprobs(directory: Path, sequences: Sequence[Sequence[int]], **options: Any) -> list[np.ndarray]:
    """What `logprobs` gives, computed in float64 from end to end: what two computations in float32 are both off from.
    `options` are those of `from_pretrained`."""
    model = families.load(directory, dtype=torch.float64, **options)
    with InFloat64():
        return logprobs(model, sequences)


def logprobs(model: torch.nn.Module, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Of each sequence, [length − 1] float32: the log-probability of every token but the first, given those before."""
    found = []
    with torch.no_grad():
        for ids in sequences:
            logits = model(input_ids=torch.tensor([list(ids)])).logits[0].float()
            chosen = logits[:-1].log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
            found.append(chosen.numpy())
    return found
