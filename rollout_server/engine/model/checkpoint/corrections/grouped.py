"""The norm behind a state space, taken over each of its groups as transformers does and mlx-lm's classes do not."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from rollout_server.engine.model.checkpoint.meaning import Meaning

GROUPS = {"mamba2": "n_groups", "granitemoehybrid": "mamba_n_groups"}
"""Family of mlx-lm → the field that says how many groups there are."""
OWN = "RMSNormGated"
"""How the class of such a norm is called, at its end."""


class GatedGroupNorm(nn.Module):
    """RMSNorm of y · silu(gate), [..., width], over each of `groups` equal parts of the width."""

    def __init__(self, weight: mx.array, eps: float, groups: int) -> None:
        super().__init__()
        self.weight = weight
        self._eps = eps
        self._groups = groups

    def __call__(self, y: mx.array, gate: mx.array | None = None) -> mx.array:
        if gate is not None:
            y = nn.silu(gate) * y
        parts = mx.unflatten(y, -1, (self._groups, -1))
        return self.weight * mx.flatten(mx.fast.rms_norm(parts, None, self._eps), -2)


def norm_by_group(module: nn.Module, said: Meaning, family: str) -> int:
    """Gives the module such norms where config.json says more than one group; how many."""
    groups = said.get(GROUPS.get(family, ""))
    if not isinstance(groups, int) or groups < 2:
        return 0
    found = {
        path: GatedGroupNorm(layer["weight"], layer.eps, groups)
        for path, layer in module.named_modules()
        if type(layer).__name__.endswith(OWN)
    }
    module.update_modules(tree_unflatten(list(found.items())))
    return len(found)
