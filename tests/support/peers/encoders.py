"""Tiny encoders as transformers saves them, for every family, and what torch computes with them in float32."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from rollout_server.engine.messages.options import Task
from rollout_server.engine.model.encoders.passages import Passage
from tests.support.tiny_models import VOCAB_SIZE, write_tokenizer

CLASSES: dict[Task, Any] = {
    "classify": AutoModelForSequenceClassification,
    "token_classify": AutoModelForTokenClassification,
    "embed": AutoModel,
}
POSITIONS = 140
SHARED: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": POSITIONS,
}
BEHIND: dict[str, Any] = {"type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5}
RELATIVE: dict[str, Any] = {
    "relative_attention": True,
    "norm_rel_ebd": "layer_norm",
    "position_buckets": 16,
    "max_relative_positions": -1,
    "position_biased_input": False,
}


@dataclass(frozen=True)
class Encoder:
    kind: str
    """`model_type`."""
    config: dict[str, Any] = field(default_factory=dict)
    alone: bool = False
    """Configured by these fields and no others but the vocabulary and the positions."""


ENCODERS: dict[str, Encoder] = {
    "bert": Encoder("bert"),
    "bert, gelu by tanh": Encoder("bert", {"hidden_act": "gelu_new", "layer_norm_eps": 1e-5}),
    "roberta": Encoder("roberta", BEHIND),
    "xlm-roberta": Encoder("xlm-roberta", BEHIND),
    "distilbert": Encoder("distilbert", {"dim": 64, "n_layers": 3, "n_heads": 4, "hidden_dim": 96}, alone=True),
    "modernbert": Encoder("modernbert", {"num_hidden_layers": 4, "local_attention": 16, "pad_token_id": 0}),
    "modernbert, mean": Encoder(
        "modernbert",
        {
            "local_attention": 32,
            "pad_token_id": 0,
            "classifier_pooling": "mean",
            "norm_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "classifier_bias": True,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "deberta-v2": Encoder(
        "deberta-v2",
        {**RELATIVE, "pos_att_type": ["p2c", "c2p"], "conv_kernel_size": 3, "conv_act": "gelu", "type_vocab_size": 2},
    ),
    "deberta-v3": Encoder("deberta-v2", {**RELATIVE, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}),
    "deberta-v2, plain": Encoder(
        "deberta-v2",
        {
            "relative_attention": True,
            "pos_att_type": "c2p",
            "position_biased_input": True,
            "type_vocab_size": 3,
            "embedding_size": 40,
            "pooler_hidden_act": "tanh",
        },
    ),
    "deberta-v2, absolute": Encoder("deberta-v2", {"pos_att_type": ["p2c"], "position_biased_input": True}),
}
"""A name for each that says in what it differs."""


def build(
    name: str,
    task: Task,
    directory: Path,
    *,
    labels: int = 3,
    grid: torch.dtype = torch.float32,
    saved: torch.dtype = torch.float32,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Writes an encoder and a tokenizer to `directory` as transformers saves them, with values that `grid` represents
    exactly, in the dtype `saved`. Returns `directory`."""
    encoder = ENCODERS[name]
    directory.mkdir(parents=True, exist_ok=True)
    write_tokenizer(directory)
    shared = {key: SHARED[key] for key in ("vocab_size", "max_position_embeddings")} if encoder.alone else SHARED
    ids = {} if "pad_token_id" in encoder.config else {"pad_token_id": 0}
    fields = {**shared, **ids, "bos_token_id": 2, "eos_token_id": 3, **encoder.config, **overrides}
    if encoder.kind == "modernbert":
        fields |= {"cls_token_id": 2, "sep_token_id": 3}
    config = AutoConfig.for_model(encoder.kind, **fields, **({} if task == "embed" else {"num_labels": labels}))
    model = CLASSES[task].from_config(config, dtype=torch.float32)
    randomise(model, seed, grid)
    model.to(saved).save_pretrained(directory)
    return directory


def load(directory: Path, task: Task) -> PreTrainedModel:
    """The model of `build` in torch, float32, attention spelt out."""
    return CLASSES[task].from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


def randomise(model: PreTrainedModel, seed: int, grid: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            value = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                value *= 0.2
            elif parameter.ndim == 1:
                value = 1 + 0.2 * value
            elif "embeddings" in name:
                value *= 0.5
            else:
                # Attention that chooses, instead of averaging.
                queries = any(part in name for part in ("query", "key", "q_lin", "k_lin"))
                value *= (1.7 if queries else 1.0) * parameter[0].numel() ** -0.5
            parameter.copy_(value.to(grid))


def passages(lengths: Sequence[int], *, types: int = 0, pad: int | None = None, seed: int = 5) -> list[Passage]:
    """Random ones; with several token types pairs, each cut at a place of its own, and pad ids in some of them."""
    generator = np.random.default_rng(seed)
    found = []
    for at, length in enumerate(lengths):
        ids = generator.integers(4, VOCAB_SIZE, size=length)
        if pad is not None and at % 2 and length > 4:
            ids[[1, length // 2]] = pad
        cut = int(generator.integers(0, length + 1))
        kinds = (np.arange(length) >= cut).astype(int) if types > 1 and at != 1 else np.zeros(length, int)
        found.append(Passage(tuple(ids.tolist()), tuple(kinds.tolist()) if kinds.any() else ()))
    return found


def computed(model: torch.nn.Module, task: Task, read: Sequence[Passage]) -> list[np.ndarray]:
    """Each passage by itself: label scores, those of tokens, or the states of tokens, float32."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    takes_types = "token_type_ids" in inspect.signature(inner.forward).parameters
    found = []
    with torch.no_grad():
        for passage in read:
            types = passage.types or (0,) * len(passage.ids)
            given = {"token_type_ids": torch.tensor([types])} if takes_types else {}
            ids = torch.tensor([passage.ids])
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids), **given)
            values = output.last_hidden_state if task == "embed" else output.logits
            found.append(values[0].float().numpy())
    return found


Kind = Literal["lora", "dora"]


def adapted(
    directory: Path, task: Task, kind: Kind, seed: int = 1, targets: str | list[str] = "all-linear", **more: Any
) -> PeftModel:
    """The model with a random adapter, no part of it zero, and as random a copy of what is trained beside it. `more`
    are fields of its configuration."""
    options: dict[str, Any] = {"r": 3, "lora_alpha": 7, "use_dora": kind == "dora", "target_modules": targets, **more}
    model = get_peft_model(load(directory, task), LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    scale = max(layer.scaling["default"] for layer in model.modules() if isinstance(layer, LoraLayer))
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if ".modules_to_save." in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            if ".lora_" not in name:
                continue
            value = torch.randn(parameter.shape, generator=generator)
            if "lora_magnitude_vector" in name:
                value = parameter * (0.3 * value).exp()
            else:
                value *= parameter.shape[-1] ** -0.5 * (0.4 / scale if "lora_B" in name else 1.0)
            parameter.copy_(value)
    return model.eval()
