"""Fields that change numbers without changing which weights there are. A field that decides about names or shapes of
weights needs no entry: loading is strict, so a model that differs there does not load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rollout_server.engine.model.checkpoint.family import Family
from rollout_server.engine.model.checkpoint.meaning import Meaning
from rollout_server.engine.model.checkpoint.renames import OTHER_NAMES
from rollout_server.quoting import quoted

OFF = (None, False, 0, 0.0)
ONE = (None, 1, 1.0)

SAYS_SO = {
    # A configuration that names one of these means it, whether or not transformers has it for this family.
    "attn_logit_softcapping": OFF,
    "final_logit_softcapping": OFF,
    "logits_soft_cap": OFF,
    "clip_qkv": OFF,
    "embedding_multiplier": ONE,
    "residual_multiplier": ONE,
    "logits_scaling": ONE,
    "logit_scale": ONE,
    "attention_multiplier": (None,),
    "use_bidirectional_attention": (*OFF, "vision"),
    "scale_attn_by_inverse_layer_idx": OFF,
    "scale_attn_weights": (None, True),
    "alibi": OFF,
}
"""Field → values with which it changes nothing."""

IF_KNOWN = {
    "position_embedding_type": (None, "rope", "absolute"),
    "query_pre_attn_scalar": (None,),
    "norm_topk_prob": (None,),
    "scoring_func": (None,),
    "topk_method": (None,),
    "n_group": ONE,
    "topk_group": ONE,
    "routed_scaling_factor": ONE,
    "moe_renormalize": (None,),
    "num_expert_group": ONE,
    "moe_apply_router_weight_on_input": OFF,
    "moe_norm_min": (None,),
    "rope_interleave": (None,),
    "swiglu_alpha": (None,),
    "swiglu_limit": (None,),
    "use_parallel_residual": (None,),
    "parallel_attn": (None,),
    "attn_temperature_tuning": OFF,
    "layer_norm_eps": (None,),
    "layer_norm_epsilon": (None,),
    "rms_norm_eps": (None,),
    "norm_eps": (None,),
    "full_attn_alpha_factor": ONE,
    "full_attn_beta_factor": ONE,
    "linear_attn_alpha_factor": ONE,
    "linear_attn_beta_factor": ONE,
    "mlp_alpha_factor": ONE,
    "mlp_beta_factor": ONE,
    "no_rope_layers": (None,),
    "time_step_limit": (None,),
    "num_experts_per_tok": (None, 0),
    "indexer_types": (None, "full"),
    "mamba_hidden_act": (None, "silu", "swish"),
    "kda_lower_bound": (None,),
    "kda_safe_gate": OFF,
    "residual_gate_temperature": (None,),
}
"""The same for fields that mean something only where transformers has them for the family."""

DOES: Mapping[tuple[str, str], tuple[Any, ...]] = {
    # (family of mlx-lm, field) → values that its code has written into it.
    ("deepseek_v2", "norm_topk_prob"): (False,),
    ("deepseek_v3", "rope_interleave"): (True,),
    ("glm4_moe_lite", "rope_interleave"): (True,),
    ("deepseek_v3", "scoring_func"): ("sigmoid",),
    ("deepseek_v32", "scoring_func"): ("sigmoid",),
    ("glm_moe_dsa", "scoring_func"): ("sigmoid",),
    ("dots1", "scoring_func"): ("sigmoid", "noaux_tc"),
    ("exaone_moe", "scoring_func"): ("sigmoid",),
    ("glm4_moe", "scoring_func"): ("sigmoid",),
    ("glm4_moe_lite", "scoring_func"): ("sigmoid",),
    ("solar_open", "scoring_func"): ("sigmoid",),
    ("mimo_v2_flash", "scoring_func"): ("sigmoid",),
    ("minimax", "scoring_func"): ("sigmoid",),
    ("gpt_oss", "swiglu_alpha"): (1.702,),
    ("gpt_oss", "swiglu_limit"): (7.0,),
    ("ernie4_5_moe", "moe_norm_min"): (1e-12,),
    ("nanochat", "final_logit_softcapping"): (15.0,),
    ("nanochat", "rms_norm_eps"): (1e-6,),
    ("mamba", "layer_norm_epsilon"): (1e-5,),
    ("qwen2_moe", "norm_topk_prob"): (False,),
    ("falcon_h1", "time_step_limit"): ([0.0, float("inf")],),
    ("muse_spark", "residual_gate_temperature"): (0.3,),
    # It has no experts: a model with some does not load.
    ("llama4_text", "num_experts_per_tok"): (1,),
}

WRONG: Mapping[tuple[str, str], tuple[Any, ...]] = {
    # (family of mlx-lm, field) → the only values for which its code does what transformers does.
    ("jamba", "num_experts"): (None, 0, 1),
    # transformers has queries, keys and values of a head beside each other where every head has its own.
    ("gpt_bigcode", "multi_query"): (None, True),
}

UNWEIGHTED = frozenset(
    {
        "bailing_hybrid",
        "deepseek_v3",
        "deepseek_v32",
        "dots1",
        "exaone_moe",
        "glm4_moe",
        "glm4_moe_lite",
        "glm_moe_dsa",
        "kimi_linear",
        "mimo_v2_flash",
        "nemotron_h",
        "solar_open",
    }
)
"""Families of mlx-lm that do not normalise the score of a token's only expert, which transformers does."""


def unserved(raw: Mapping[str, Any], said: Meaning, family: Family) -> Iterator[str]:
    """A sentence for each field whose value the family's code does not compute with."""
    for (name, field), right in WRONG.items():
        if name == family.name and not _among(said.get(field), right):
            yield f"{field} is {quoted(said.get(field))}, with which mlx-lm's {name} computes something else"
    if family.name in UNWEIGHTED and said.get("num_experts_per_tok") == 1 and said.get("norm_topk_prob") is True:
        yield f"num_experts_per_tok is 1 with norm_topk_prob, which mlx-lm's {family.name} does not normalise"
    for name, harmless in (SAYS_SO | IF_KNOWN).items():
        others = {field for field, other in (OTHER_NAMES | said.names).items() if other == name}
        if {name, said.names.get(name, name), *others} & family.reads or not (name in SAYS_SO or name in said.declared):
            continue
        value = said.get(name) if name in said.declared else raw.get(name)
        also = DOES.get((family.name, name), ())
        if name == "query_pre_attn_scalar":
            also = (*also, said.get("head_dim"))
        if name == "no_rope_layers" and family.name == "llama4":
            also = ([int((i + 1) % 4 != 0) for i in range(len(value or ()))],)
        if not _among(value, (*harmless, *also)):
            yield f"{name} is {quoted(value)}, which {family.code} does not compute"


def _among(value: Any, values: tuple[Any, ...]) -> bool:
    """Returns whether the value, or every one of a list, is one of these."""
    if any(_same(value, each) for each in values):
        return True
    return isinstance(value, list) and all(any(_same(each, other) for other in values) for each in value)


def _same(value: Any, other: Any) -> bool:
    """As JSON has it: true is not 1."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)
