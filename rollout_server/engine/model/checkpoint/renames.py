"""Fields that mlx-lm knows under a name, or in a form, that newer releases of transformers no longer write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rollout_server.engine.model.checkpoint.family import Family
from rollout_server.engine.model.checkpoint.meaning import Meaning

LAYER_KINDS = {
    "linear_attention": "mamba",
    "full_attention": "attention",
    "indexed_attention": "deepseek_sparse_attention",
}
"""What transformers calls a kind of layer now, and what it was called."""
PERIODS = ("sliding_window_pattern", "full_attention_interval", "global_attn_every_n_layers")
"""Every how many layers one sees everything."""
OTHER_NAMES = {
    "block_dim": "hidden_size",
    "layernorm_epsilon": "rms_norm_eps",
    "moe_renormalize": "norm_topk_prob",
    "moe_top_k": "num_experts_per_tok",
    "moe_topk": "num_experts_per_tok",
    "num_experts_per_token": "num_experts_per_tok",
}
"""A field of mlx-lm → what says the same."""
ALWAYS = {"topk_method": "noaux_tc", "norm_topk_prob": True}
"""What transformers does without a field, in families where mlx-lm has one."""
ROPE = frozenset({"rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq", "partial_rotary_factor"})


def renamed_fields(raw: Mapping[str, Any], said: Meaning, family: Family) -> dict[str, Any]:
    """Fields of the family's class that `raw` lacks or has in an older or newer form."""
    found: dict[str, Any] = {}
    for name in family.fields - ROPE:
        if raw.get(name) is None and (value := said.get(name)) is not None:
            found[name] = value
    if said.known:
        found |= _needed({**raw, **found}, said, family)
    kinds = said.get("layer_types")
    if isinstance(kinds, list) and kinds:
        found |= _of_layers(raw, said, kinds, family)
    if (dense := _leading_dense(said.get("mlp_layer_types"))) is not None:
        found |= _missing(raw, {"first_k_dense_replace": dense, "moe_layer_freq": 1}, family)
    if isinstance(mlps := said.get("mlp_layer_types"), list):
        found |= _missing(raw, {"is_moe_layer": [kind == "sparse" for kind in mlps]}, family)
    return found


def _needed(told: Mapping[str, Any], said: Meaning, family: Family) -> dict[str, Any]:
    """What a class insists on, or takes otherwise than transformers when it is not said."""
    found = {name: said.get(other) for name, other in OTHER_NAMES.items()}
    found["head_dim"] = head_dim(said) or None
    found = {name: v for name, v in found.items() if name in family.fields and told.get(name) is None and v is not None}
    for name in family.required - told.keys() - found.keys():
        if name not in family.reads:
            found[name] = None
        elif name.endswith("_bias"):
            # One that is in the weights all the same is refused when they are loaded.
            found[name] = False
        elif name in ALWAYS:
            found[name] = ALWAYS[name]
    if "position_embedding_type" in family.fields and said.get("position_embedding_type") != "rope":
        found["position_embedding_type"] = "nope"
    return found


def head_dim(said: Meaning) -> int:
    """Width of a head; 0 if the file does not say it."""
    own, hidden, heads = (said.get(name) for name in ("head_dim", "hidden_size", "num_attention_heads"))
    if isinstance(own, int):
        return own
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else 0


def _of_layers(raw: Mapping[str, Any], said: Meaning, kinds: Sequence[str], family: Family) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("layer_types", "layers_block_type"):
        if name in family.fields:
            # The words of the source say which names it was written for.
            found[name] = [kind if kind in family.words else LAYER_KINDS.get(kind, kind) for kind in kinds]
    for name in PERIODS:
        if name not in family.fields:
            continue
        if isinstance(raw.get(name), str) or "L" in family.words:
            # Without a window all layers are alike in transformers, and the class turns none that has a G.
            found[name] = _letters(kinds) if said.get("sliding_window") else None
        elif (period := _period(kinds)) is not None:
            found[name] = period
    found |= _missing(raw, {"attn_type_list": [int(kind == "full_attention") for kind in kinds]}, family)
    return found


def _missing(raw: Mapping[str, Any], values: Mapping[str, Any], family: Family) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in family.fields and raw.get(name) is None}


def _letters(kinds: Sequence[str]) -> str:
    """G for every layer that sees everything, else L, as far as they repeat."""
    return "".join("G" if kind == "full_attention" else "L" for kind in kinds[: _period(kinds)])


def _period(kinds: Sequence[str]) -> int | None:
    """p if exactly every p-th layer sees everything; None for another pattern."""
    if "full_attention" not in kinds:
        return len(kinds) + 1
    period = kinds.index("full_attention") + 1
    regular = all((kind == "full_attention") == ((i + 1) % period == 0) for i, kind in enumerate(kinds))
    return period if regular else None


def _leading_dense(kinds: Any) -> int | None:
    """How many layers come before the first with experts, if all behind it have some."""
    if not isinstance(kinds, list) or not kinds:
        return None
    dense = next((i for i, kind in enumerate(kinds) if kind != "dense"), len(kinds))
    return dense if "dense" not in kinds[dense:] else None
