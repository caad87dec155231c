"""How far apart two float32 computations of the same numbers may lie, whatever the processor, the BLAS and the shapes.

The order in which a product's terms are added is the kernel's: it changes with the batch, with a merged weight in the
place of an adapter beside it, with the processor. Every addition rounds, and what follows from that is arithmetic.

One rounding is off by at most u = eps / 2 of what it rounds, evenly, so by u / √3 in the root mean square. N of them in
a row with signs of their own make √N · u / √3, the difference of two such computations √2 of that, and five standard
deviations, which one value in a million passes, are 5 · √(2/3) · √N · u = 2.04 · √N · eps. The unit is the largest
value: it stands some three times above what is rounded on the way, and a layer makes its input's error no more than
about so much larger.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from rollout_server.rollout import Rollout
from tests.support.tiny_models import SHARED, VOCAB_SIZE
from trainer_client import RolloutBatch

FLOAT32 = 2.0**-23
"""eps: the distance from 1 to the next number."""
IN_SERIES = 5
"""Products of a layer that stand one behind the other: queries, their scores, the output, up and down. What an adapter
adds to each has a rank, which is small beside the width."""
RECURRENT = frozenset({"mamba2", "granitemoehybrid", "falcon_h1", "qwen3_next"})
FASTEST = 8
"""A recurrent layer takes exp(-rate · step) of a step that it computes, so an error of the step counts as often as the
rate says. The tiny models' rates go from 1 to their number of heads, 8 at most."""


def relative(roundings: float, eps: float = FLOAT32) -> float:
    """For sums with so many roundings in a row, in units of the largest value."""
    return 2 * math.sqrt(roundings) * eps


def amplified(family: str) -> int:
    return FASTEST if family in RECURRENT else 1


@dataclass(frozen=True, slots=True)
class Network:
    """What the number of roundings up to a log-probability depends on."""

    depth: int
    width: int
    """Terms in a product, at most."""
    vocabulary: int

    def roundings(self, length: int) -> int:
        """In a row, after `length` tokens: the products of each layer, its weighted sum over the tokens, the head, and
        the sum of the softmax over the vocabulary."""
        return self.depth * (IN_SERIES * self.width + length) + self.width + self.vocabulary

    def of_logits(self, logits: ArrayLike, length: int) -> float:
        """For logits, for their log-probabilities, and for hidden states."""
        return relative(self.roundings(length)) * max(1.0, float(np.max(np.abs(np.asarray(logits)))))

    def of_logprobs(self, logprobs: ArrayLike, length: int) -> float:
        """Where only log-probabilities are known. A logit is one of them plus the log of the sum; it lies between
        -|log-probability| and that log, which for logits around zero of a variance up to 2 · log(vocabulary) is at
        most 2 · log(vocabulary)."""
        known = float(np.nanmax(np.abs(np.asarray(logprobs, np.float64)), initial=0.0))
        return self.of_logits([known, 2 * math.log(self.vocabulary)], length)

    def of_row(self, row: Rollout) -> float:
        return self.of_logprobs(row.logprobs, len(row.prompt_ids) + len(row.token_ids))

    def of_batch(self, batch: RolloutBatch) -> float:
        """As the client holds rows."""
        longest = max(len(row.prompt_token_ids) + len(row.token_ids) for row in batch)
        return self.of_logprobs(batch.logprobs, longest)


TINY = Network(SHARED["num_hidden_layers"], SHARED["intermediate_size"], VOCAB_SIZE)
GOLDEN = Network(2, 44, VOCAB_SIZE)
"""tests/golden"""
EMBEDDED = Network(5, 256, 384)
"""The model that the package carries."""


def of_softmax(logits: ArrayLike) -> float:
    """For what is made of given logits: a handful of roundings of the logit itself, and a sum over the vocabulary, in
    blocks of at most 512 and then of the blocks, which are at least 128 wide or few."""
    known = np.asarray(logits, np.float64)
    largest = float(np.max(np.abs(known[np.isfinite(known)])))
    return relative(512 + known.shape[-1] // 128) + relative(4) * largest


def assert_near(found: ArrayLike, expected: ArrayLike, within: float | None = None, says: str = "") -> None:
    """Logits [..., length, vocabulary] of a tiny model within the bound that follows from them, or within another."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    within = TINY.of_logits(expected, expected.shape[-2]) if within is None else within
    np.testing.assert_allclose(found, expected, atol=within, rtol=0, err_msg=says)
