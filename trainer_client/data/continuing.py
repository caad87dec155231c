"""Going on with rows that were cut short or wait for what a tool said: rows → prompts, and replies → whole rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainer_client.data.arrays import host_array
from trainer_client.data.rollout import Rollout, Span

if TYPE_CHECKING:
    from trainer_client.data.batch import RolloutBatch

_LEFT_BEHIND = ("log_kept_mass", "entropy", "base_logprobs", "top_ids", "top_logprobs")
"""Arrays that a prefix does not carry."""


def continued(rollout: Rollout, tokens: ArrayLike = (), **fields: Any) -> dict[str, Any]:
    """The prompt object that goes on where `rollout` ended, as an element of `rollouts`' prompts.

    tokens   ids [T] that stand between: a tool's or the environment's words, masked from the loss
    fields   of the prompt object, such as `max_tokens`, which counts all tokens of the row, or `n`

    A partial row goes on with its own seed: on the same version it becomes the row that it would have been."""
    given = host_array(tokens)
    if given.ndim != 1 or (given.size and not np.issubdtype(given.dtype, np.integer)):
        raise ValueError(f"tokens must be a list of token ids, not {given.dtype} of shape {given.shape}.")
    prompt: dict[str, Any] = {"token_ids": rollout.prompt_token_ids.tolist(), "seed": rollout.seed}
    if rollout.images:
        prompt["images"] = list(rollout.images)
    if rollout.prompt_id is not None:
        prompt["id"] = rollout.prompt_id
    ids = [*rollout.token_ids.tolist(), *given.tolist()]
    if ids:
        count = len(given)
        prompt["prefix"] = {
            "token_ids": ids,
            "logprobs": _values(rollout.logprobs, count),
            "sampling_logprobs": _values(rollout.sampling_logprobs, count),
            "loss_mask": [*rollout.loss_mask.tolist(), *[0] * count],
            "versions": _spans(rollout.spans, len(ids)),
        }
        prompt["prefix"] = {name: value for name, value in prompt["prefix"].items() if value is not None}
    return prompt | fields


def rejoined(batch: RolloutBatch, earlier: Sequence[Rollout] | RolloutBatch) -> RolloutBatch:
    """Rows that went on from those of `earlier`, one each and in its order, with what their prefixes could not carry:
    prompt and sample index, so that groups are what they were, and the values of `log_kept_mass`, `entropy`,
    `base_logprobs` and `top_logprobs`."""
    if len(batch) != len(earlier):
        raise ValueError(f"{len(batch)} rows cannot have gone on from {len(earlier)}: give one for each, in order.")
    rows = []
    for at, (row, before) in enumerate(zip(batch, earlier, strict=True)):
        count = len(before.token_ids)
        if not np.array_equal(row.token_ids[:count], before.token_ids):
            raise ValueError(f"Row {at} does not begin with the tokens of the row it should have gone on from.")
        arrays: dict[str, Any] = {
            name: _filled(getattr(row, name), getattr(before, name), count) for name in _LEFT_BEHIND
        }
        rows.append(replace(row, prompt_index=before.prompt_index, sample_index=before.sample_index, **arrays))
    return type(batch).of(rows, policy=batch.policy, instance=batch.instance, complete=batch.complete)


def _values(array: NDArray[np.float32] | None, missing: int) -> list[float | None] | None:
    if array is None:
        return None
    return [*(None if np.isnan(value) else value for value in array.tolist()), *[None] * missing]


def _spans(spans: Sequence[Span], length: int) -> list[dict[str, Any]] | None:
    """What a tool said belongs to the span before it; None where nothing was sampled before."""
    if not spans:
        return None
    stretched = [*spans[:-1], replace(spans[-1], end=length)]
    return [
        {
            "policy": span.policy,
            "version": span.version,
            "digest": span.digest,
            "label": span.label,
            "start": span.start,
            "end": span.end,
        }
        for span in stretched
    ]


def _filled(now: NDArray[Any] | None, before: NDArray[Any] | None, count: int) -> NDArray[Any] | None:
    """The array of now with the first `count` values of before, where both have them."""
    if now is None or before is None or now.shape[1:] != before.shape[1:]:
        return now
    return np.concatenate([before[:count], now[count:]])
