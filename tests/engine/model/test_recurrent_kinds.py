"""What a self-test at load finds out of recurrent and hybrid classes of mlx-lm: whether their state can be kept, and
whether prompts of several lengths may be read together. No list says so."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_map

from rollout_server.engine.kv_cache.mlx_caches import MlxCacheKV
from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.model.kv_choice import choose_store, padding_fault
from rollout_server.engine.model.resident import ResidentModel
from tests.engine.batch.test_batch import JOINED, tolerance
from tests.engine.batch.test_prefix_reuse import assert_all_same
from tests.laws.grids import corners, some_long
from tests.support.engine.door import wrap_forwards
from tests.support.engine.driver import Driver, prompts_of

VOCABULARY = 64
SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "attention_bias": False,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "mamba_proj_bias": False,
    "head_dim": 8,
}
FAMILIES: dict[str, tuple[bool, dict[str, Any]]] = {
    # Whether the class looks at lengths everywhere, and what its configuration says besides.
    "mamba": (False, {"intermediate_size": 64, "state_size": 8, "time_step_rank": 4}),
    "rwkv7": (
        False,
        {"head_dim": 16, "a_low_rank_dim": 8, "v_low_rank_dim": 8, "gate_low_rank_dim": 8, "decay_low_rank_dim": 8},
    ),
    "lfm2": (
        True,
        {
            "conv_bias": False,
            "conv_L_cache": 3,
            "block_dim": 32,
            "block_ff_dim": 48,
            "block_multiple_of": 8,
            "block_ffn_dim_multiplier": 1.0,
            "block_auto_adjust_ff_dim": False,
            "layer_types": ["conv", "full_attention"],
        },
    ),
    "jamba": (
        False,
        {
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
            "expert_layer_offset": 1,
            "expert_layer_period": 2,
            "mamba_d_conv": 4,
            "mamba_d_state": 8,
            "mamba_expand": 2,
            "mamba_dt_rank": 4,
            "num_experts": 1,
            "num_experts_per_tok": 1,
        },
    ),
    "qwen3_5": (
        True,
        {
            "text_config": {
                **SHARED,
                "model_type": "qwen3_5_text",
                "full_attention_interval": 2,
                "linear_num_value_heads": 4,
                "linear_num_key_heads": 2,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
            }
        },
    ),
    # Its convolution looks at lengths, and its state does not.
    "nemotron_h": (
        False,
        {
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "time_step_limit": [0.0, 1e9],
            "mlp_bias": False,
            "layer_norm_epsilon": 1e-5,
            "hybrid_override_pattern": ["M", "*"],
        },
    ),
}


OURS: dict[str, dict[str, Any]] = {
    "lstm": {},
    "xlstm": {"num_heads": 2, "ffn_proj_factor": 1.5},
    "recurrent_gemma": {"attention_window_size": 512, "block_types": ["recurrent", "attention"]},
}


@pytest.mark.parametrize(("family", "dtype"), corners([*FAMILIES, *OURS], [mx.float32, mx.bfloat16]), ids=str)
def test_what_a_class_does_is_found_out(family: str, dtype: mx.Dtype) -> None:
    looks, fields = FAMILIES[family] if family in FAMILIES else (True, OURS[family])
    package = "mlx_lm.models" if family in FAMILIES else "rollout_server.models.recurrent"
    module = importlib.import_module(f"{package}.{family}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict({**SHARED, **fields, "model_type": family}))
    model.update(tree_map(lambda array: array + 0.1 * mx.random.normal(array.shape), model.parameters()))
    model.set_dtype(dtype)
    chosen = choose_store(model, VOCABULARY, EngineOptions("nowhere", family), compiles=False)
    store = chosen.make(4)
    assert chosen.kind == "batch" and isinstance(store, MlxCacheKV)
    assert store.snapshots
    fault = padding_fault(lambda tokens, caches: model(tokens, cache=caches), model.make_cache, VOCABULARY)
    assert (fault is None) is looks
    assert store.pads is (looks and (family in OURS or mx.default_device() != mx.cpu))


@pytest.mark.parametrize("family", some_long([*JOINED, "qwen3_next"], "granitemoehybrid", "falcon_h1", "xlstm", "lstm"))
def test_short_prompts_are_read_in_one_forward(
    family: str, bare_model: Callable[[str], ResidentModel], model_path: Callable[[str], Path]
) -> None:
    """The numbers are those of prompts that are read one at a time."""
    bare = bare_model(family)
    # A CPU reads prompts of most classes one at a time, since that is faster.
    padded = partial(MlxCacheKV, bare.make_caches, row_cells=bare.info.kv_bytes_per_row, pads=True)
    driver = Driver.start(model_path(family), replace(bare, make_store=padded), prefix_cache=False)
    shapes: list[tuple[int, ...]] = []

    def noting(forward: Any) -> Any:
        def noted(tokens: mx.array, caches: list[Any]) -> mx.array:
            shapes.append(tokens.shape)
            return forward(tokens, caches)

        return noted

    wrap_forwards(driver.batch(0), noting)
    prompts = prompts_of([30, 22, 41, 28], 286)
    rows = driver.generate(prompts, max_tokens=6, ignore_eos=True)
    assert shapes[0][0] == 4 and sum(shape[1] > 1 for shape in shapes) == 2, "what is left of the longest comes after"
    one_by_one = Driver.start(model_path(family), bare, prefix_cache=False)
    alone = [
        one_by_one.generate([prompt], seeds=[[row.seed]], max_tokens=6, ignore_eos=True)[0]
        for prompt, row in zip(prompts, rows, strict=True)
    ]
    times = 50 if family == "qwen3_next" else 1  # A tiny random one makes the last bits of a product so much larger.
    assert_all_same(rows, alone, times * tolerance(driver, rows))
