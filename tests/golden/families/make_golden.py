"""Writes the golden files of families that mlx-lm computes otherwise than transformers, or where float32 is far from
exact: tiny models, and the log-probabilities that transformers' code gives in float64.

`make golden-families`, or `python -m tests.golden.families.make_golden [NAME…]` where torch is installed. Weights are
float16 in the files.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from tests.golden.make_golden import halved
from tests.support import tiny_models
from tests.support.peers import families, reference

HERE = Path(__file__).parent
SMALL = {"hidden_size": 16, "intermediate_size": 20, "max_position_embeddings": 256, "num_hidden_layers": 2}
SMALL |= {"tie_word_embeddings": True}
LATENT = {"kv_lora_rank": 12, "q_lora_rank": 14, "qk_rope_head_dim": 8, "qk_nope_head_dim": 6, "v_head_dim": 10}
GROUPED = {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 12}
DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 6, "linear_value_head_dim": 7}
CHOSEN: dict[str, dict[str, Any]] = {
    # An eps that shows where a norm has another one, and as many key heads as latent attention has.
    "glm4_moe_lite": {
        **LATENT,
        **GROUPED,
        "num_key_value_heads": 4,
        "mlp_layer_types": ["dense", "sparse"],
        "rms_norm_eps": 0.05,
        "tie_word_embeddings": False,
    },
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "block_types": ["recurrent", "recurrent", "attention"],
        "attention_window_size": 16,
        "num_key_value_heads": 1,
        "lru_width": 24,
        "head_dim": 8,
        "rms_norm_eps": 0.05,
    },
    "qwen3_next": {
        **DELTA,
        "head_dim": 12,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "partial_rotary_factor": 0.5},
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
}
LENGTHS = (61, 13, 2)
BELOW = 1.5
"""What biases of routers by group are lowered by: all to below zero, where a score of 0 is above them."""


def main() -> None:
    for family in sys.argv[1:] or CHOSEN:
        with tempfile.TemporaryDirectory() as place:
            write(family, Path(place), HERE / family)


def write(family: str, scratch: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    families.build(family, scratch, grid=torch.float16, **SMALL | CHOSEN[family])
    weights = {name: _lowered(name, value) for name, value in load_file(scratch / "model.safetensors").items()}
    save_file(weights, scratch / "model.safetensors", metadata={"format": "pt"})
    save_file(halved(weights), target / "model.safetensors")
    shutil.copy(scratch / "config.json", target)
    generator = np.random.default_rng(11)
    prompts = [generator.integers(0, tiny_models.VOCAB_SIZE, size=length).tolist() for length in LENGTHS]
    found = {"prompts": np.concatenate(prompts).astype(np.int32), "lengths": np.array(LENGTHS, np.int32)}
    # The grouped product of experts is for lower precisions only.
    options = {} if family == "recurrent_gemma" else {"experts_implementation": "eager"}
    found["base"] = np.concatenate(reference.exact_logprobs(scratch, prompts, **options)).astype(np.float32)
    save_file(found, target / "reference.safetensors")


def _lowered(name: str, value: np.ndarray) -> np.ndarray:
    if not name.endswith("e_score_correction_bias"):
        return value
    return (value - BELOW).astype(np.float16).astype(value.dtype)


if __name__ == "__main__":
    main()
