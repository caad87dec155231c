"""Norms that mlx-lm's classes take otherwise than transformers: over another width, or with another eps."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from rollout_server.engine.model.checkpoint.meaning import Meaning

GROUPS = {"mamba2": "n_groups", "granitemoehybrid": "mamba_n_groups"}
"""Family of mlx-lm → the field that says how many groups the norm behind a state space has."""
OWN = "RMSNormGated"
"""How the class of such a norm is called, at its end."""
EPS: Mapping[str, Mapping[str, float]] = {
    # transformers gives these the default of its class, and mlx-lm the rms_norm_eps of config.json.
    "glm4_moe_lite": {"q_a_layernorm": 1e-6, "kv_a_layernorm": 1e-6},
}
"""Family of mlx-lm → name of a norm → its eps in transformers."""


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


def set_eps(module: nn.Module, family: str) -> int:
    """Gives the module's norms the eps that transformers has there; how many had another one."""
    changed = 0
    for path, layer in module.named_modules():
        eps = EPS.get(family, {}).get(path.rpartition(".")[2])
        if eps is not None and layer.eps != eps:
            layer.eps = eps
            changed += 1
    return changed
