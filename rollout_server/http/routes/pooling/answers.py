"""Asking the engine for label scores, and what is told of them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from litestar import Request
from numpy.typing import NDArray

from rollout_server.engine.messages.options import Activation
from rollout_server.engine.messages.scoring import Classified, Classify, Embed
from rollout_server.errors import InvalidField
from rollout_server.http.problems import renamed
from rollout_server.http.replies.streaming import while_connected
from rollout_server.http.service import Service
from rollout_server.rollout import PolicyAddress, PolicyVersion
from rollout_server.text.pictures.picture import Picture

OUR_WORDS = {"policy": "model"}
Scores = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Labelled:
    """Label scores of every sequence, as the head gives them."""

    version: PolicyVersion
    labels: tuple[str | None, ...]
    activation: Activation
    scores: tuple[Scores, ...]
    """Each [positions, labels]."""

    def probabilities(self, activates: bool) -> tuple[Scores, ...]:
        """The scores, or what the model makes of them."""
        return tuple(activated(scores, self.activation) for scores in self.scores) if activates else self.scores


async def labelled(
    request: Request[Any, Any, Any],
    service: Service,
    address: PolicyAddress,
    sequences: Sequence[tuple[int, ...]],
    positions: Sequence[tuple[int, ...]] | None = None,
    label_token_ids: Sequence[int] = (),
    types: Sequence[tuple[int, ...]] = (),
    pictures: Sequence[tuple[Picture, ...]] = (),
) -> Labelled:
    """Scores at `positions`, or where a whole sequence's head is read. A sequence without positions is not read.
    `types` are of the tokens of each sequence, where the texts of pairs are told apart by them; `pictures` are
    what its placeholders stand for."""
    places = positions if positions is not None else [(service.info.head_position(ids),) for ids in sequences]
    wanted = [index for index, own in enumerate(places) if own]
    # One is read in any case, so that the reply can say what it was asked under.
    read = wanted or [0]
    classify = Classify(
        service.engine.new_id("classify"),
        address,
        tuple(sequences[index] for index in read),
        tuple(places[index] or (0,) for index in read),
        tuple(label_token_ids),
        tuple(types[index] for index in read) if any(types) else (),
        pictures=tuple(pictures[index] for index in read) if any(pictures) else (),
    )
    with renamed(OUR_WORDS):
        classified = await while_connected(request, service.engine.classify(classify))
    found = {index: _array(classified, at) for at, index in enumerate(read)} if wanted else {}
    nothing = np.zeros((0, len(classified.labels)))
    scores = tuple(found.get(index, nothing) for index in range(len(sequences)))
    return Labelled(classified.version, classified.labels, classified.activation, scores)


async def embedded(
    request: Request[Any, Any, Any], service: Service, address: PolicyAddress, sequences: Sequence[tuple[int, ...]]
) -> tuple[PolicyVersion, Scores]:
    """Pooled hidden states [sequences, width], of whatever length they have."""
    how = service.info.embedding
    if how.refusal:
        raise InvalidField(how.refusal, param="model")
    embed = Embed(service.engine.new_id("embed"), address, tuple(sequences))
    with renamed(OUR_WORDS):
        found = await while_connected(request, service.engine.embed(embed))
    vectors = np.frombuffer(b"".join(found.vectors), "<f4").reshape(len(sequences), how.width)
    return found.version, vectors.astype(np.float64)


def unit_vectors(vectors: Scores) -> Scores:
    """Scaled to length 1; a zero vector stays zero."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def _array(classified: Classified, at: int) -> Scores:
    return np.frombuffer(classified.scores[at], "<f4").reshape(-1, len(classified.labels)).astype(np.float64)


def activated(scores: Scores, activation: Activation) -> Scores:
    """[positions, labels] → probabilities of each label, or of all together."""
    match activation:
        case "sigmoid":
            return 0.5 * (1.0 + np.tanh(0.5 * scores))
        case "softmax":
            shifted = np.exp(scores - scores.max(axis=-1, keepdims=True, initial=-np.inf))
            return shifted / shifted.sum(axis=-1, keepdims=True)
    return scores


def usage_of(sequences: Sequence[Sequence[int]]) -> dict[str, int]:
    tokens = sum(map(len, sequences))
    return {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}


def envelope(kind: str, model: str) -> dict[str, Any]:
    """How vLLM's lists begin."""
    return {"id": f"{kind}-{secrets.token_hex(12)}", "object": "list", "created": int(time.time()), "model": model}
