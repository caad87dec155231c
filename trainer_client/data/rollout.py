"""One row of a batch, as a trainer stores it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from trainer_client.data.sampling_options import neutral_values
from trainer_client.data.versions import PolicyRef

LOGPROB_ARRAYS = ("logprobs", "sampling_logprobs", "log_kept_mass", "entropy", "base_logprobs")
"""Per-token float32 arrays, by their name on the wire; all but the first only when asked for."""

PER_TOKEN: Mapping[str, DTypeLike] = MappingProxyType(
    {"token_ids": np.int32, "loss_mask": np.uint8, **dict.fromkeys(LOGPROB_ARRAYS, np.float32)}
)
"""Every per-token array and its dtype; `top_ids` and `top_logprobs` besides have k values for each token."""

NO_TOKEN = -1
"""Stands in `top_ids` where there is none."""


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens `start` (included) to `end` (excluded) of a row were sampled by this version. The first four are None in a
    prefix that came without versions."""

    policy: str | None
    version: int | None
    digest: str | None
    label: str | None
    start: int
    end: int
    kv: str | None = None
    """`carried` or `recomputed` where a row outlived a swap."""


@dataclass(frozen=True, slots=True)
class RowFault:
    """Why a row ended as `error`."""

    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RowReward:
    """What a reward model gave a row, or with `error` why it gave nothing."""

    scores: tuple[float, ...] = ()
    """Scores of each label, raw; empty with `error`."""
    version: PolicyRef | None = None
    """What scored it."""
    error: RowFault | None = None

    @property
    def value(self) -> float | None:
        """The score of the only label; None where there are several, or none."""
        return self.scores[0] if len(self.scores) == 1 else None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Rollout:
    """One row: all per-token arrays have the length of `token_ids`; NaN = no value, None = not asked for."""

    prompt_index: int
    sample_index: int
    prompt_token_ids: NDArray[np.int32]
    """Exactly what the model read."""
    token_ids: NDArray[np.int32]
    """Exactly what was sampled, the end token included."""
    loss_mask: NDArray[np.uint8]
    """1 = sampled by a policy, 0 = given in a prefix."""
    logprobs: NDArray[np.float32]
    """Log-probabilities under the unmodified distribution: temperature 1, no filter."""
    sampling_logprobs: NDArray[np.float32] | None
    """Log-probabilities under the distribution sampled from; 0.0 for greedy rows."""
    log_kept_mass: NDArray[np.float32] | None
    """Log-mass the filters left; NaN for greedy rows."""
    entropy: NDArray[np.float32] | None
    """Entropy of the unmodified distribution, in nats."""
    base_logprobs: NDArray[np.float32] | None
    """`logprobs` of the same tokens under the base."""
    top_ids: NDArray[np.int32] | None
    """[n, k]: per token the k most probable ids of the unmodified distribution, best first."""
    top_logprobs: NDArray[np.float32] | None
    """[n, k]: the log-probabilities of those ids."""
    prompt_logprobs: NDArray[np.float32] | None
    """Log-probabilities of the prompt's tokens; NaN for the first."""
    spans: tuple[Span, ...]
    """Spans, which tile the tokens."""
    finish_reason: str
    """`stop`, `length`, `superseded`, `aborted` or `error`."""
    stop_reason: str | int | None
    """The stop string, the token id or the cause."""
    seed: int
    """Reproduces the row when sent with n = 1 to the same version."""
    text: str | None
    """The text; None unless asked for."""
    prompt_id: str | None
    """The prompt's own `id`, if it was given one."""
    id: str | None
    """The row's own name: the request's id, prompt and sample."""
    error: RowFault | None
    reward: RowReward | None = None
    """None unless a reward model was named."""
    images: tuple[str, ...] = field(default=(), repr=False)
    """The pictures of its prompt as URLs, in the order of their placeholders; they go along wherever it is read again.
    Known of rows whose prompts this client sent."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Effective sampling parameters."""
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Fields of the reply that have no attribute here: those of a newer server."""

    @property
    def modified_by(self) -> str | None:
        """The sampling parameters that make what was sampled differ from the model's own distribution, as text."""
        neutral = neutral_values()
        changed = [
            f"{name}={value!r}"
            for name, value in self.sampling.items()
            if name in neutral and value is not None and value != neutral[name]
        ]
        return ", ".join(changed) or None
