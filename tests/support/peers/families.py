"""Tiny random models of many families, made and saved by transformers: torch and the server read the same files.

Shapes are asymmetric on purpose: heads × head size is not the hidden size, key heads are fewer than heads, and no width
divides another, so that a transposed or misplaced tensor cannot fit.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.support.tiny_models import VOCAB_SIZE, write_tokenizer

SHARED: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "intermediate_size": 53,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    # No family's default, so that one which is not read shows.
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
BY_KIND = {
    "full_attention": {"rope_type": "default", "rope_theta": 500000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
}
# torch's grouped product wants widths of whole 16 bytes.
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True, "intermediate_size": 60}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 60}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
YARN |= {"rope_theta": 150000.0, "original_max_position_embeddings": 128}


@dataclass(frozen=True)
class Family:
    config: dict[str, Any] = field(default_factory=dict)
    experts: bool = False
    """In transformers 5 experts are stacked parameters and their router is no linear layer; PEFT targets both as
    parameters when it is told to adapt all linear layers of such a family."""


FAMILIES: dict[str, Family] = {
    "llama": Family({"head_dim": 20}),
    "mistral": Family({"head_dim": 20, "sliding_window": None}),
    "ministral3": Family({"head_dim": 20, "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1, "mscale": 1.0}}),
    "qwen2": Family(),
    "qwen3": Family({"head_dim": 20, "tie_word_embeddings": True}),
    "qwen3_moe": Family(
        {"head_dim": 20, "moe_intermediate_size": 40, "decoder_sparse_step": 1, "mlp_only_layers": [], **EXPERTS},
        experts=True,
    ),
    "qwen2_moe": Family(
        {**EXPERTS, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 37, "norm_topk_prob": False},
        experts=True,
    ),
    "gemma2": Family({"head_dim": 20, "query_pre_attn_scalar": 20, "tie_word_embeddings": True}),
    # mlx-lm rounds √hidden to bf16, which is exact for 64.
    "gemma3_text": Family(
        {
            "hidden_size": 64,
            "head_dim": 20,
            "query_pre_attn_scalar": 20,
            "tie_word_embeddings": True,
            "rope_parameters": BY_KIND,
            **SLIDING,
        },
    ),
    "phi3": Family({"original_max_position_embeddings": 512}),
    "mixtral": Family(LOCAL_EXPERTS, experts=True),
    "olmo2": Family(),
    "olmo3": Family(SLIDING),
    "olmoe": Family(EXPERTS, experts=True),
    "gpt_oss": Family({"head_dim": 20, "rope_parameters": YARN, **LOCAL_EXPERTS, **SLIDING}),
    "granite": Family({"attention_multiplier": 0.3, "residual_multiplier": 0.7, "logits_scaling": 1.3}),
    "granitemoe": Family(LOCAL_EXPERTS),
    "smollm3": Family({"no_rope_layers": [1, 0]}),
    "cohere": Family({"tie_word_embeddings": True}),
    "seed_oss": Family({"head_dim": 20}),
    "ernie4_5": Family({"head_dim": 20}),
    "hunyuan_v1_dense": Family({"head_dim": 20}),
    "nemotron": Family(),
    "starcoder2": Family(),
    "stablelm": Family({"hidden_size": 64}),
    "glm": Family({"head_dim": 20}),
    "glm4": Family({"head_dim": 20}),
    "helium": Family({"head_dim": 12}),
    "exaone4": Family({"head_dim": 20, **SLIDING}),
    # transformers' own cache takes heads of whole 64 numbers only.
    "xlstm": Family(
        {"num_heads": 4, "chunk_size": 16, "ffn_proj_factor": 1.3, "ffn_round_up_to_multiple_of": 4, "use_cache": False}
    ),
    "cohere2": Family({"hidden_size": 80, "head_dim": 20, "tie_word_embeddings": True, **SLIDING}),
}


def build(
    name: str,
    directory: Path,
    *,
    seed: int = 0,
    grid: torch.dtype = torch.float32,
    auto: type = AutoModelForCausalLM,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Path:
    """Writes a model of the family, one of `FAMILIES` or another, and a tokenizer to `directory` as transformers saves
    them, weights in `dtype` with values that `grid` represents exactly. `auto` makes it of the configuration. Returns
    `directory`."""
    family = FAMILIES.get(name, Family())
    directory.mkdir(parents=True, exist_ok=True)
    special = write_tokenizer(directory)
    ids = {"eos_token_id": special["<|end|>"], "pad_token_id": special["<|pad|>"]}
    # Configurations keep the dictionaries that they are given, and change them.
    config = AutoConfig.for_model(name, **deepcopy({**SHARED, **ids, **family.config, **overrides}))
    model = auto.from_config(config, dtype=torch.float32)  # type: ignore[attr-defined]
    randomise(model, seed, grid)
    model.to(dtype).save_pretrained(directory)
    return directory


def load(directory: Path, auto: type = AutoModelForCausalLM, **options: Any) -> PreTrainedModel:
    """The model of `build` in torch, float32, attention spelt out."""
    how = {"dtype": torch.float32, "attn_implementation": "eager", **options}
    return auto.from_pretrained(directory, **how).eval()  # type: ignore[attr-defined]


def randomise(model: PreTrainedModel, seed: int, grid: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    gemma = model.config.model_type.startswith(("gemma", "nemotron"))  # These multiply by 1 + weight.
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            value = torch.randn(parameter.shape, generator=generator)
            if name.endswith(("bias", "sinks")):
                value *= 0.2
            elif parameter.ndim == 1:
                value = 0.2 * value + (0.0 if gemma else 1.0)
            elif "embed_tokens" in name:
                value *= 0.3
            else:
                value *= (1.7 if "q_proj" in name or "k_proj" in name else 1.0) * parameter.shape[-1] ** -0.5
            parameter.copy_(value.to(grid))
