"""The arithmetic between rewards and a policy-gradient loss, in numpy: group advantages and importance weights.

Everything is flat or of any one shape, so it works on a batch's flat arrays and on padded ones alike.
"""

from __future__ import annotations

from enum import StrEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainer_client.data.arrays import host_array


class Denominator(StrEnum):
    """Which log-probability of the sampler stands under the importance ratio. It must be of the distribution that the
    loss takes the trainer's log-probability from."""

    FILTERED = "filtered"
    """`sampling_logprobs`: the distribution actually sampled from, filters and temperature included."""
    TEMPERED = "tempered"
    """`sampling_logprobs + log_kept_mass`: at the row's temperature, before top-k, top-p and min-p."""
    UNMODIFIED = "unmodified"
    """`logprobs`: only where temperature is 1 and there is no filter, penalty, bias or mask."""


def group_advantages(
    rewards: ArrayLike, groups: ArrayLike, *, scale_by_std: bool = True, epsilon: float = 1e-4
) -> NDArray[np.float32]:
    """Advantage of each row within its group: (reward − group mean) / (group std + epsilon).

    rewards   float [R], finite
    groups    int [R], equal for rows of one group; `batch.prompt_index` for one reply
    returns   float32 [R]; 0 for groups of one and for groups whose rewards are all equal

    The standard deviation has n − 1 in its denominator, as in the usual GRPO trainers (DeepSeekMath, arXiv 2402.03300).
    `scale_by_std=False` leaves the division out (Dr. GRPO, arXiv 2503.20783). Raises `ValueError`."""
    values, ids = host_array(rewards).astype(np.float64), host_array(groups)
    if values.ndim != 1 or values.shape != ids.shape:
        raise ValueError(f"rewards {values.shape} and groups {ids.shape} must be two vectors of one length.")
    if not np.isfinite(values).all():
        row = int(np.argmin(np.isfinite(values)))
        raise ValueError(f"The reward of row {row} is {values[row]}: one such value would spoil its whole group.")
    _, first, group, counts = np.unique(ids, return_index=True, return_inverse=True, return_counts=True)
    values = values - values[first][group]  # equal rewards are now exactly 0, and so is their advantage
    centred = values - (np.bincount(group, values) / counts)[group]
    if not scale_by_std:
        return centred.astype(np.float32)
    variance = np.bincount(group, centred**2) / np.maximum(counts - 1, 1)
    return (centred / (np.sqrt(variance)[group] + epsilon)).astype(np.float32)


def truncated_importance_weights(
    trainer_logprobs: ArrayLike, sampler_logprobs: ArrayLike, loss_mask: ArrayLike | None = None, *, cap: float = 2.0
) -> NDArray[np.float32]:
    """min(exp(trainer − sampler), cap) per token: corrects for tokens that a slightly different policy sampled.

    trainer_logprobs   float, any shape: under the trainer's own model, of the same distribution as the denominator
    sampler_logprobs   same shape: `batch.denominator(…)`, flat, or the same thing padded
    loss_mask          same shape; where it is 0 the weight is 0 and both values may be missing (NaN)
    returns            float32, same shape

    Treat the weights as constants: no gradient flows through them. Raises `ValueError` on a missing value under the
    mask, which exp would turn into a NaN loss."""
    trainer, sampler = (host_array(values).astype(np.float64) for values in (trainer_logprobs, sampler_logprobs))
    mask = np.ones(trainer.shape, bool) if loss_mask is None else host_array(loss_mask) != 0
    if not trainer.shape == sampler.shape == mask.shape:
        raise ValueError(
            f"trainer_logprobs {trainer.shape}, sampler_logprobs {sampler.shape} and loss_mask {mask.shape} "
            "must have one shape."
        )
    if not cap > 0:
        raise ValueError(f"cap must be above 0, not {cap}.")
    missing = mask & (np.isnan(trainer) | np.isnan(sampler))
    if missing.any():
        at = tuple(int(i) for i in np.argwhere(missing)[0])
        raise ValueError(f"There is no log-probability at {at}, where loss_mask is 1: {int(missing.sum())} in all.")
    weights = np.zeros(trainer.shape, np.float32)
    # the cap is taken before exp, so that a large difference cannot overflow
    weights[mask] = np.exp(np.minimum(trainer[mask] - sampler[mask], np.log(cap)))
    return weights
