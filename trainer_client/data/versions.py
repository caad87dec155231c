"""Versions as the client sees them: what a push returned, what the server keeps, what a reply names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class PolicyRef:
    """One version of a policy; the base is version 0."""

    name: str
    version: int
    digest: str
    """`sha256:` and 64 hex digits: equal digests are equal weights, on any server at any time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedVersion:
    """What `push` made or `activate` chose. Every rollout asked for after it was returned uses it or a later one."""

    name: str
    version: int
    """Grows by one per name; comparable only within one `instance`."""
    digest: str
    label: str | None
    live: bool
    """True if the name now points here."""
    unchanged: bool
    """The server held these weights already; nothing was staged."""
    verified: bool
    """True if the client computed the same digest itself; false where it cannot (see `adapter_digest`)."""
    instance: str
    kind: str | None = None
    mode: str | None = None
    rank: int | None = None
    nbytes: int | None = None
    base: Mapping[str, Any] = field(default_factory=dict)
    """`id` and `digest` of the base it was fitted to."""
    report: Mapping[str, Any] = field(default_factory=dict)
    """`modules`: how many layers are adapted; `delta_norm` (‖ΔW‖ of all); `effective_rank` (mean of modules, of
    singular values); `largest_modules` with both for the largest; `zero_modules`; `bytes`. Empty where nothing was
    sent, as are `base`, `rank` and `timings_ms`."""
    timings_ms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptVersion:
    """A version that the server still holds."""

    version: int
    digest: str
    live: bool
    label: str | None = None
    kind: str | None = None
    mode: str | None = None
    pinned: bool = False
    rows_in_use: int = 0
    nbytes: int | None = None
    created: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLine:
    """A name and the versions kept under it, oldest first. `live` is None if the name points nowhere."""

    name: str
    live: int | None
    versions: tuple[KeptVersion, ...]
    instance: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One entry of `/v1/models`: the base, a name, or a version of a name."""

    id: str
    digest: str | None = None
    max_model_len: int | None = None
    vocab_size: int | None = None
    dtype: str | None = None
    quantization: Mapping[str, Any] | None = None
    kv_bits: int | None = None
    """8 where the server keeps keys and values in so many bits; None where as the model computed them."""
    eos_token_ids: tuple[int, ...] = ()
