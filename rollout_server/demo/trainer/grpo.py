"""The loss of group-relative policy optimisation, as functions of arrays. Knows MLX; no HTTP, no task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from trainer_client import RolloutBatch

Forward = Callable[[mx.array], mx.array]
"""Token ids, int32 [R, L] → logits [R, L, V]."""


@dataclass(frozen=True, slots=True)
class Packed:
    """R rollouts with N sampled tokens in all, as the loss reads them."""

    inputs: mx.array
    """int32 [R, L]: prompt, completion, padding."""
    positions: mx.array
    """int32 [N]: where in the flattened inputs the logits of each sampled token stand."""
    token_ids: mx.array
    """int32 [N]: the sampled tokens."""
    logprobs: mx.array
    """float32 [N]: their log-probabilities as the server returned them."""


def pack(batch: RolloutBatch) -> Packed:
    """Padding goes behind the completions, where a causal model needs no mask against it."""
    padded = batch.padded(prompt_padding="right")
    # The logits that chose a token stand one position before it. Row by row, this is the order of the flat arrays.
    positions = np.flatnonzero(padded["completion_mask"]) - 1
    return Packed(
        inputs=mx.array(padded["input_ids"]),
        positions=mx.array(positions.astype(np.int32)),
        token_ids=mx.array(batch.token_ids),
        logprobs=mx.array(batch.logprobs),
    )


def token_logprobs(forward: Forward, packed: Packed) -> mx.array:
    """float32 [N]: log-softmax of the model's own logits at every sampled token."""
    logits = forward(packed.inputs)
    logits = logits.reshape(-1, logits.shape[-1])[packed.positions].astype(mx.float32)
    chosen = mx.take_along_axis(logits, packed.token_ids[:, None], axis=-1)[:, 0]
    return chosen - mx.logsumexp(logits, axis=-1)


def grpo_loss(forward: Forward, packed: Packed, advantages: mx.array, clip: float) -> mx.array:
    """Clipped policy-gradient loss, mean over the tokens. `advantages` is float32 [N]. The ratio's denominator is what
    the server returned, which at temperature 1 without filters is the distribution that was sampled from."""
    ratio = mx.exp(token_logprobs(forward, packed) - packed.logprobs)
    clipped = mx.clip(ratio, 1 - clip, 1 + clip)
    return -mx.minimum(ratio * advantages, clipped * advantages).mean()
