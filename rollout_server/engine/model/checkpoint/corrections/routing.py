"""Which experts a token gets where they are chosen by group: mlx-lm gives those of the groups left out a score of 0,
and transformers one that is never chosen."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from rollout_server.engine.model.checkpoint.meaning import Meaning

BIAS = "e_score_correction_bias"
"""What is added to the scores only to choose by them."""


def lift_biases(module: nn.Module, said: Meaning) -> int:
    """Lifts such biases to 0 and more where there is more than one group; how many gates had some below. Scores lie
    between 0 and 1 before it, so that 0 is less than what is left; and the same number on all changes no choice."""
    groups = said.get("n_group")
    if not isinstance(groups, int) or groups < 2:
        return 0
    lifted = 0
    for _, layer in module.named_modules():
        if BIAS in layer and bool(mx.any(layer[BIAS] < 0)):
            layer[BIAS] = layer[BIAS] - mx.min(layer[BIAS])
            lifted += 1
    return lifted
