"""What stands on an encoder's body: scores of a whole sequence, or of each of its tokens, in float32 from the body's
states on. A head has the modules that transformers' class for the family has, under the same names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from rollout_server.models.encoders.activations import ACTIVATIONS
from rollout_server.models.encoders.attention import tokens_kept
from rollout_server.models.encoders.bert import BertBody
from rollout_server.models.encoders.modernbert import ModernBertArgs


class Headed(nn.Module):
    """A body under its family's name with a head beside it. `scores` takes the body's states [B, N, hidden], and int32
    [B] lengths or None where all columns are tokens: → float32 [B, labels], or [B, N, labels] of a token's head."""

    def __init__(self, trunk: str, body: nn.Module) -> None:
        super().__init__()
        self._trunk = trunk
        self[trunk] = body

    @property
    def body(self) -> Any:
        return self[self._trunk]

    @property
    def parts(self) -> list[nn.Module]:
        """The modules of the head, which compute in float32 whatever the body does."""
        return [part for name, part in self.children().items() if name != self._trunk and isinstance(part, nn.Module)]

    def scores(self, states: mx.array, lengths: mx.array | None = None) -> mx.array:
        """Each head has its own."""
        raise NotImplementedError

    def __call__(
        self, ids: mx.array, types: mx.array | None = None, lengths: mx.array | None = None, *, mixed: bool = False
    ) -> mx.array:
        return self.scores(self.body(ids, types, lengths, mixed=mixed), lengths)


class TokenHead(Headed):
    """One linear layer for every token: all families but ModernBERT."""

    def __init__(self, trunk: str, body: nn.Module, args: Any, labels: int) -> None:
        super().__init__(trunk, body)
        self.classifier = nn.Linear(args.hidden_size, labels)

    def scores(self, states: mx.array, lengths: mx.array | None = None) -> mx.array:
        return self.classifier(states.astype(mx.float32))


class Pooler(nn.Module):
    """The dense layer of a pooler; its activation is the head's."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden, hidden)


class BertHead(Headed):
    """tanh of a pooler, which transformers has in the body, at the first token; then one linear layer."""

    def __init__(self, trunk: str, body: BertBody, args: Any, labels: int) -> None:
        super().__init__(trunk, body)
        body.pooler = Pooler(args.hidden_size)
        self.classifier = nn.Linear(args.hidden_size, labels)

    @property
    def parts(self) -> list[nn.Module]:
        return [*super().parts, self.body.pooler]

    def scores(self, states: mx.array, lengths: mx.array | None = None) -> mx.array:
        return self.classifier(mx.tanh(self.body.pooler.dense(states[:, 0].astype(mx.float32))))


class RobertaLayers(nn.Module):
    def __init__(self, hidden: int, labels: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden, hidden)
        self.out_proj = nn.Linear(hidden, labels)

    def __call__(self, x: mx.array) -> mx.array:
        return self.out_proj(mx.tanh(self.dense(x)))


class RobertaHead(Headed):
    """Two layers on the first token, with tanh between them."""

    def __init__(self, trunk: str, body: nn.Module, args: Any, labels: int) -> None:
        super().__init__(trunk, body)
        self.classifier = RobertaLayers(args.hidden_size, labels)

    def scores(self, states: mx.array, lengths: mx.array | None = None) -> mx.array:
        return self.classifier(states[:, 0].astype(mx.float32))


class DistilBertHead(Headed):
    """Two layers on the first token, with a rectifier between them."""

    def __init__(self, trunk: str, body: nn.Module, args: Any, labels: int) -> None:
        super().__init__(trunk, body)
        self.pre_classifier = nn.Linear(args.dim, args.dim)
        self.classifier = nn.Linear(args.dim, labels)

    def scores(self, states: mx.array, lengths: mx.array | None = None) -> mx.array:
        return self.classifier(nn.relu(self.pre_classifier(states[:, 0].astype(mx.float32))))


class DebertaHead(Headed):
    """A pooler with the configuration's activation at the first token, then one linear layer."""

    def __init__(self, trunk: str, body: nn.Module, args: Any, labels: int) -> None:
        super().__init__(trunk, body)
        self._activation = ACTIVATIONS[args.pooler_hidden_act]
        self.pooler = Pooler(args.hidden_size)
        self.classifier = nn.Linear(args.hidden_size, labels)

    def scores(self, states: mx.array, lengths: mx.array | None = None) -> mx.array:
        return self.classifier(self._activation(self.pooler.dense(states[:, 0].astype(mx.float32))))


class Prediction(nn.Module):
    """ModernBERT's dense layer with activation and norm, before the linear layer of either head."""

    def __init__(self, args: ModernBertArgs) -> None:
        super().__init__()
        self._activation = ACTIVATIONS[args.classifier_activation]
        self.dense = nn.Linear(args.hidden_size, args.hidden_size, bias=args.classifier_bias)
        self.norm = args.norm()

    def __call__(self, x: mx.array) -> mx.array:
        return self.norm(self._activation(self.dense(x)))


class ModernBertTokenHead(Headed):
    def __init__(self, trunk: str, body: nn.Module, args: ModernBertArgs, labels: int) -> None:
        super().__init__(trunk, body)
        self.head = Prediction(args)
        self.classifier = nn.Linear(args.hidden_size, labels)

    def scores(self, states: mx.array, lengths: mx.array | None = None) -> mx.array:
        return self.classifier(self.head(states.astype(mx.float32)))


class ModernBertHead(ModernBertTokenHead):
    """The same on the first token, or on the mean of all tokens, as `classifier_pooling` says."""

    def __init__(self, trunk: str, body: nn.Module, args: ModernBertArgs, labels: int) -> None:
        super().__init__(trunk, body, args, labels)
        self._of_mean = args.classifier_pooling == "mean"

    def scores(self, states: mx.array, lengths: mx.array | None = None) -> mx.array:
        pooled = mean_of_tokens(states, lengths) if self._of_mean else states[:, 0].astype(mx.float32)
        return self.classifier(self.head(pooled))


MakeHead = Callable[[str, Any, Any, int], Headed]
"""(Name of the body, body, arguments, labels) → the whole module."""


def mean_of_tokens(states: mx.array, lengths: mx.array | None) -> mx.array:
    """[B, N, hidden] → float32 [B, hidden] over the columns that hold tokens."""
    states = states.astype(mx.float32)
    kept = tokens_kept(lengths, states.shape[1])
    if kept is None or lengths is None:
        return states.mean(axis=1)
    return mx.where(kept[..., None], states, 0).sum(axis=1) / lengths[:, None].astype(mx.float32)
