"""Which encoders there are: for each model type its body, its heads, and what transformers calls them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from rollout_server.models.encoders.bert import BertArgs, BertBody
from rollout_server.models.encoders.deberta_v2 import DebertaV2Args, DebertaV2Body
from rollout_server.models.encoders.distilbert import DistilBertArgs, DistilBertBody
from rollout_server.models.encoders.heads import (
    BertHead,
    DebertaHead,
    DistilBertHead,
    Headed,
    MakeHead,
    ModernBertHead,
    ModernBertTokenHead,
    RobertaHead,
    TokenHead,
)
from rollout_server.models.encoders.modernbert import ModernBertArgs, ModernBertBody

OLD_NAMES = {".gamma": ".weight", ".beta": ".bias"}
"""What the norms' parameters are called in the first files that were published."""


@dataclass(frozen=True, slots=True)
class EncoderFamily:
    architecture: str
    """transformers' classes are called by it: `BertModel`, `BertForSequenceClassification`, …"""
    trunk: str
    """What the body is called in a model with a head."""
    arguments: Callable[..., Any]
    body: Callable[[Any], Any]
    sequence_head: MakeHead
    token_head: MakeHead
    labels: str = "classifier"
    """The layer of the sequence head with a row for each label."""

    @property
    def computed(self) -> frozenset[str]:
        """Fields of config.json that the code computes with."""
        return frozenset(field.name for field in dataclasses.fields(self.arguments))  # type: ignore[arg-type]

    def arguments_of(self, fields: Mapping[str, Any]) -> Any:
        """From config.json as transformers settles it; raises `TypeError` where one is missing."""
        return self.arguments(**{name: fields[name] for name in self.computed & fields.keys()})

    def named(self, weights: Mapping[str, mx.array], module: nn.Module) -> dict[str, mx.array]:
        """A checkpoint's tensors under the names and in the layout of this module. One without a head takes the body
        alone, whatever else the file holds; and what transformers leaves unread is left unread."""
        headed = isinstance(module, Headed)
        body = module.body if headed else module
        prefix = f"{self.trunk}."
        inside = any(name.startswith(prefix) for name in weights)
        found: dict[str, mx.array] = {}
        for name, value in weights.items():
            of_body = name.removeprefix(prefix) if inside else name
            if not headed and inside and of_body == name:
                continue
            if of_body == "embeddings.position_ids" or self._unread(of_body, body, headed and of_body == name):
                continue
            name = name if headed else of_body
            for old, new in OLD_NAMES.items():
                name = name.removesuffix(old) + new if name.endswith(old) else name
            found[name] = value.swapaxes(1, 2) if name.endswith(CONVOLUTION) else value
        return found

    def _unread(self, name: str, body: nn.Module, of_head: bool) -> bool:
        """A pooler that no head reads, and a table of positions that the configuration does without."""
        if name.startswith("pooler."):
            return not of_head and "pooler" not in body
        return name == "embeddings.position_embeddings.weight" and "position_embeddings" not in body["embeddings"]


CONVOLUTION = "encoder.conv.conv.weight"
"""[out, in, size] in torch and [out, size, in] in MLX."""

_ROBERTA = EncoderFamily("Roberta", "roberta", BertArgs, BertBody, RobertaHead, TokenHead, labels="classifier.out_proj")
ENCODERS: Mapping[str, EncoderFamily] = MappingProxyType(
    {
        "bert": EncoderFamily("Bert", "bert", BertArgs, BertBody, BertHead, TokenHead),
        "roberta": _ROBERTA,
        "xlm-roberta": dataclasses.replace(_ROBERTA, architecture="XLMRoberta"),
        "distilbert": EncoderFamily(
            "DistilBert", "distilbert", DistilBertArgs, DistilBertBody, DistilBertHead, TokenHead
        ),
        "modernbert": EncoderFamily(
            "ModernBert", "model", ModernBertArgs, ModernBertBody, ModernBertHead, ModernBertTokenHead
        ),
        "deberta-v2": EncoderFamily("DebertaV2", "deberta", DebertaV2Args, DebertaV2Body, DebertaHead, TokenHead),
    }
)
"""By config.json's `model_type`."""
