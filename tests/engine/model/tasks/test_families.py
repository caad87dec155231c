"""A model that scores ends at the hidden states, in every family that is listed here: what the whole class of mlx-lm
gives to its output over the vocabulary is what the class without one gives, from a file that lacks it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from rollout_server.engine.model.tasks.kinds import OUTPUT_LAYERS, without_output

HIDDEN = 32
SHARED: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "bias": False,
    "partial_rotary_factor": 0.5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
EXPERTS |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "n_routed_experts": 4}
GPT2 = {"n_embd": HIDDEN, "n_head": 4, "n_layer": 2, "n_positions": 512, "n_ctx": 512, "n_inner": 48}
GRANITE = {"embedding_multiplier": 2.0, "attention_multiplier": 0.3, "residual_multiplier": 0.7, "logits_scaling": 1.3}
# Its output alone is given states that were divided by what hidden_size is of dim_model_base; a head is not.
MINICPM = {"dim_model_base": HIDDEN, "scale_depth": 1.4, "scale_emb": 2.0}
SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
CAPPED = {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 15.0, "query_pre_attn_scalar": 8}

FAMILIES: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"logit_scale": 0.5, "sliding_window": 16, "sliding_window_pattern": 2},
    "ernie4_5": {},
    "exaone": {"num_layers": 2, "layer_norm_epsilon": 1e-5},
    "exaone4": {"rope_scaling": None, "sliding_window": None, "sliding_window_pattern": None},
    "gemma": {},
    "gemma2": CAPPED,
    "gemma3_text": {"query_pre_attn_scalar": 8, "sliding_window": 16, "sliding_window_pattern": 2},
    "glm": {},
    "glm4": {},
    "gpt2": GPT2,
    "gpt_bigcode": {**GPT2, "multi_query": True},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.5},
    "gptj": {**GPT2, "rotary_dim": 4},
    "granite": GRANITE,
    "granitemoe": {**GRANITE, **EXPERTS},
    "helium": {},
    "hunyuan_v1_dense": {},
    "internlm2": {},
    "internlm3": {"qkv_bias": False},
    "llama": {},
    "mimo": {"num_nextn_predict_layers": 0},
    "minicpm": MINICPM,
    "mixtral": EXPERTS,
    "nemotron": {"hidden_act": "relu2"},
    "olmo2": {},
    "olmo3": SLIDING,
    "olmoe": EXPERTS,
    "phi": {"rotary_pct": 0.5},
    "phi3": {"original_max_position_embeddings": 512},
    "qwen2": {},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 24},
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "seed_oss": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": {"use_qkv_bias": False, "qk_layernorm": False},
    "starcoder2": {"use_bias": True},
}


def output_reads(model: nn.Module) -> list[mx.array]:
    """What the output over the vocabulary is given from now on: a layer of its own, or the embedding's table."""
    seen: list[mx.array] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            _watch(module, "as_linear", seen.append)
        elif path.rpartition(".")[2] in OUTPUT_LAYERS and isinstance(module, nn.Linear):
            _watch(module, "__call__", seen.append)
    return seen


def _watch(module: nn.Module, name: str, tell: Callable[[mx.array], None]) -> None:
    kind = type(module)
    plain = getattr(kind, name)

    def watched(self: nn.Module, states: mx.array) -> mx.array:
        tell(states)
        return plain(self, states)

    module.__class__ = type(kind.__name__, (kind,), {name: watched})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_without_its_output_ends_at_what_the_output_reads(family: str) -> None:
    package = importlib.import_module(f"mlx_lm.models.{family}")
    config = {**SHARED, **FAMILIES[family], "model_type": family}
    whole = package.Model(package.ModelArgs.from_dict(dict(config)))
    generator = np.random.default_rng(3)
    leaves = [(name, leaf.shape) for name, leaf in sorted(tree_flatten(whole.parameters()))]
    weights = {name: mx.array(generator.normal(size=shape).astype(np.float32) * 0.3) for name, shape in leaves}
    whole.load_weights(list(weights.items()))
    ids = mx.array([[3, 9, 4, 1, 60]])
    seen = output_reads(whole)
    mx.eval(whole(ids, cache=make_prompt_cache(whole)))
    (states,) = seen
    assert states.shape == (1, 5, HIDDEN)

    body_of, arguments = without_output(lambda config: (package.Model, package.ModelArgs))(config)
    body = body_of(arguments.from_dict(dict(config)))
    saved = {name: array for name, array in weights.items() if name.split(".")[-2] not in OUTPUT_LAYERS}
    body.load_weights(list(body.sanitize({**saved, "score.weight": mx.zeros((1, HIDDEN))}).items()), strict=True)
    found = body(ids, cache=make_prompt_cache(body))
    np.testing.assert_array_equal(np.array(found), np.array(states))
