"""What config.json means reaches the module: nested and renamed fields, scaled RoPE, bounds and refusals. Files are as
transformers writes them; its numbers are in tests/golden and tests/peers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx_lm.convert import convert
from mlx_lm.utils import MODEL_REMAPPING

from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.model.checkpoint.corrections.rope import frequencies
from rollout_server.engine.model.checkpoint.corrections.turning import FrequencyRoPE
from rollout_server.engine.model.checkpoint.plan import Plan, plan_of
from rollout_server.engine.model.load import ReadModel, load, read_model
from rollout_server.errors import EngineUnavailable
from tests.support import tiny_models

THETA = 500000.0


def planned(**fields: Any) -> Plan:
    shared = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 320}
    return plan_of({**shared, "intermediate_size": 96, **fields}, MODEL_REMAPPING)


def nested(directory: Path, rope: dict[str, Any], **fields: Any) -> Path:
    """The file's RoPE as transformers 5 writes it."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    flat = ("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor")
    kept = {name: value for name, value in config.items() if name not in flat}
    path.write_text(json.dumps({**kept, "rope_parameters": rope, **fields}))
    return directory


def logits(read: ReadModel, length: int = 40) -> np.ndarray:
    ids = np.random.default_rng(0).integers(0, 300, size=(1, length))
    return np.array(read.module(mx.array(ids))[0].astype(mx.float32))


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "phi3", "qwen3_moe", "gemma2", "falcon_h1", "qwen3_next"]
)
def test_a_nested_base_is_the_flat_one(family: str, tmp_path: Path) -> None:
    part = {"partial_rotary_factor": 0.5} if family == "qwen3_next" else {}
    flat = tiny_models.build(family, tmp_path / "flat", rope_theta=THETA, **part)
    written = nested(
        tiny_models.build(family, tmp_path / "nested", rope_theta=THETA, **part),
        {"rope_type": "default", "rope_theta": THETA, **part},
    )
    # transformers takes the nested value where both are there.
    both = nested(
        tiny_models.build(family, tmp_path / "both", rope_theta=THETA, **part),
        {"rope_type": "default", "rope_theta": THETA, **part},
        rope_theta=10000.0,
    )
    expected, _ = mlx_lm.load(str(flat))
    ids = mx.array(np.random.default_rng(0).integers(0, 300, size=(1, 40)))
    plain = np.array(expected(ids)[0].astype(mx.float32))
    for directory in (flat, written, both):
        np.testing.assert_array_equal(logits(read_model(directory)), plain)


def test_bases_by_kind_of_layer_reach_their_layers(tmp_path: Path) -> None:
    flat = tiny_models.build("gemma3_text", tmp_path / "flat", rope_theta=THETA, rope_local_base_freq=777.0)
    kinds = {
        "full_attention": {"rope_type": "default", "rope_theta": THETA},
        "sliding_attention": {"rope_type": "default", "rope_theta": 777.0},
    }
    types = ["sliding_attention", "full_attention"]
    written = tiny_models.build("gemma3_text", tmp_path / "nested", rope_theta=THETA, rope_local_base_freq=777.0)
    config = json.loads((written / "config.json").read_text())
    del config["sliding_window_pattern"]
    (written / "config.json").write_text(json.dumps(config))
    nested(written, kinds, layer_types=types)
    np.testing.assert_array_equal(logits(read_model(written)), logits(read_model(flat)))


def test_a_converted_and_a_quantised_copy_are_right_too(tmp_path: Path) -> None:
    source = nested(
        tiny_models.build("llama", tmp_path / "source", rope_theta=THETA), {"rope_type": "default", "rope_theta": THETA}
    )
    expected = logits(read_model(source))
    convert(str(source), str(tmp_path / "converted"))
    np.testing.assert_array_equal(logits(read_model(tmp_path / "converted")), expected)
    flat = tiny_models.build("llama", tmp_path / "flat", rope_theta=THETA)
    for path, name in ((source, "packed"), (flat, "flat and packed")):
        convert(str(path), str(tmp_path / name), quantize=True, q_group_size=32, q_bits=8)
    packed, plain = (logits(read_model(tmp_path / name)) for name in ("packed", "flat and packed"))
    np.testing.assert_array_equal(packed, plain)


def test_scaling_that_a_class_does_not_know_is_put_in(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": THETA, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 128
    # qwen3_moe has a field for it that its code never looks at.
    module = read_model(nested(tiny_models.build("qwen3_moe", tmp_path), rope)).module
    wanted = frequencies(rope, 24, 2048)
    assert wanted is not None
    for layer in module.layers:
        assert isinstance(layer.self_attn.rope, FrequencyRoPE)
        np.testing.assert_allclose(1 / np.array(layer.self_attn.rope._freqs), wanted[0], rtol=1e-6)


def test_a_rope_of_frequencies_turns_as_mlx_does() -> None:
    for traditional in (False, True):
        plain = nn.RoPE(16, traditional=traditional, base=1234.0)
        said = frequencies({"rope_type": "default", "rope_theta": 1234.0}, 16, None)
        assert said is not None
        own = FrequencyRoPE(*said, traditional=traditional)
        x = mx.random.normal((2, 3, 5, 24), key=mx.random.key(1))
        np.testing.assert_allclose(np.array(own(x, offset=7)), np.array(plain(x, offset=7)), atol=2e-6)
        offsets = mx.array([3, 9])
        np.testing.assert_allclose(np.array(own(x, offset=offsets)), np.array(plain(x, offset=offsets)), atol=2e-6)
        scaled = FrequencyRoPE(said[0], 1.5, traditional=traditional)(x, offset=7)
        np.testing.assert_allclose(np.array(scaled[..., :16]), 1.5 * np.array(own(x, offset=7)[..., :16]), atol=2e-6)
        np.testing.assert_array_equal(np.array(scaled[..., 16:]), np.array(x[..., 16:]))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"model_type": "qwen3_moe", "num_local_experts": 6}, {"num_experts": 6}),
        ({"model_type": "gpt_neox", "rope_parameters": {"rope_theta": 99.0, "partial_rotary_factor": 0.5}},
         {"rotary_emb_base": 99.0, "rotary_pct": 0.5}),
        ({"model_type": "gpt2"}, {"n_embd": 64, "n_head": 4, "n_layer": 4, "n_ctx": None}),
        ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"] * 2}, {"block_dim": 64}),
        ({"model_type": "granitemoehybrid", "layer_types": ["linear_attention", "full_attention"] * 2},
         {"layer_types": ["mamba", "attention"] * 2, "position_embedding_type": "nope"}),
        ({"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"] * 2},
         {"full_attention_interval": 2}),
        ({"model_type": "mamba2", "num_heads": 8, "head_dim": 16, "time_step_limit": [0.0, {"__float__": "Infinity"}]},
         {"time_step_limit": [0.0, float("inf")]}),
        ({"model_type": "exaone4", "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8},
         {"sliding_window_pattern": "LG"}),
        ({"model_type": "exaone4", "layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 8},
         {"sliding_window_pattern": "GLGL"}),
        ({"model_type": "exaone4", "layer_types": ["full_attention"] * 4, "sliding_window": None,
          "sliding_window_pattern": 4},
         {"sliding_window_pattern": None}),
    ],
)  # fmt: skip
def test_what_newer_files_call_otherwise_is_handed_over(fields: dict[str, Any], told: dict[str, Any]) -> None:
    plan = planned(**fields)
    assert not plan.refusals
    assert {name: plan.overrides.get(name) for name in told} == told


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "llama", "embedding_multiplier": 12.0}, "embedding_multiplier is 12.0"),
        ({"model_type": "llama", "final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
        ({"model_type": "olmoe", "clip_qkv": 8.0}, "clip_qkv is 8.0"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is true"),
        ({"model_type": "qwen2_moe", "norm_topk_prob": True}, "norm_topk_prob is true"),
        ({"model_type": "gpt_oss", "swiglu_limit": 9.0}, "swiglu_limit is 9.0"),
        ({"model_type": "jamba", "num_experts": 4}, "num_experts is 4"),
        ({"model_type": "deepseek_v3", "num_experts_per_tok": 1, "norm_topk_prob": True}, "num_experts_per_tok is 1"),
        ({"model_type": "gpt_bigcode", "multi_query": False}, "multi_query is false"),
        ({"model_type": "internlm2"}, "config.json has no rms_norm_eps"),
    ],
)
def test_what_a_family_does_not_compute_is_refused_by_name(fields: dict[str, Any], said: str) -> None:
    assert any(said in refusal and fields["model_type"] in refusal for refusal in planned(**fields).refusals)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "llama", "final_logit_softcapping": None, "embedding_multiplier": 1.0, "logit_scale": 1},
        {"model_type": "llama", "hidden_act": "swish", "norm_topk_prob": True, "unheard_of": {"a": 1}},
        {"model_type": "qwen3", "scoring_func": "softmax", "n_group": 4},
        {"model_type": "glm4_moe", "num_experts_per_tok": 1, "norm_topk_prob": False},
        {"model_type": "glm4_moe", "num_experts_per_tok": 2, "norm_topk_prob": True},
        {"model_type": "gemma3_text", "use_bidirectional_attention": False, "final_logit_softcapping": None},
    ],
)
def test_what_changes_nothing_is_no_reason_to_refuse(fields: dict[str, Any]) -> None:
    assert not planned(**fields).refusals


def test_a_bound_is_the_context_and_more_is_refused_with_its_reason(tmp_path: Path) -> None:
    directory = tiny_models.build("llama", tmp_path, model_type="llama", attention_bias=False)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "mistral", "sliding_window": 48}))
    assert load(EngineOptions(str(directory), "m")).info.max_model_len == 48
    assert load(EngineOptions(str(directory), "m", context_length=20)).info.max_model_len == 20
    with pytest.raises(EngineUnavailable, match=r"asks for 64 tokens, but .* up to 48: .*sliding_window"):
        load(EngineOptions(str(directory), "m", context_length=64))
