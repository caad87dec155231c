"""What crosses the border of the engine thread to have texts embedded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rollout_server.rollout import PolicyAddress, PolicyVersion

PoolingKind = Literal["last", "mean"]


@dataclass(frozen=True, slots=True)
class Embedding:
    """How the resident model's hidden states become one vector."""

    pooling: PoolingKind = "last"
    normalise: bool = True
    """To length 1, after `dimensions` cut it."""
    width: int = 0
    refusal: str = "This model has no hidden states that it could be embedded by."
    """Why it embeds nothing, as a sentence; empty where it does."""


@dataclass(frozen=True, slots=True)
class Embed:
    """Pooled hidden states, final norm included, of given tokens under a policy."""

    id: str
    policy: PolicyAddress
    sequences: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Embedded:
    """In the order of the request."""

    id: str
    version: PolicyVersion
    vectors: tuple[bytes, ...]
    """Each `Embedding.width` little-endian float32, pooled and nothing else."""
