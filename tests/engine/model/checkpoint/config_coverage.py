"""What becomes of every field of config.json, for each family that both transformers and mlx-lm know.

`python -m tests.engine.model.checkpoint.config_coverage [FAMILY…]` lists the fields that the family's code does not
read: mapped,
checked or `DROPPED`; those below that change no number are left out. A test fails where one is dropped. Needs no torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx_lm
from mlx_lm.utils import MODEL_REMAPPING
from transformers import CONFIG_MAPPING

from rollout_server.engine.model.checkpoint import effects, renames
from rollout_server.engine.model.checkpoint.corrections import activation, rope
from rollout_server.engine.model.checkpoint.plan import Plan, plan_of

WINDOWS = frozenset(
    [
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
        "layer_types",
        "attention_chunk_size",
        "max_position_embeddings",
    ]
)
CHECKED = {*effects.SAYS_SO, *effects.IF_KNOWN, *activation.FIELDS, *WINDOWS}
CHECKED |= {"attn_scale", "floor_scale"}  # Parts of attn_temperature_tuning.
CHECKED |= {"no_rope_layer_interval"}  # transformers makes no_rope_layers of it.
MAPPED = {*renames.ROPE, *renames.PERIODS, *rope.BASES, *rope.LOCAL_BASES, *rope.PARTS, "mlp_layer_types"}
MAPPED |= set(renames.OTHER_NAMES.values())
SHAPES = frozenset(
    # Names and shapes of weights follow from these, and loading is strict.
    [
        "attention_bias",
        "mlp_bias",
        "qkv_bias",
        "use_bias",
        "lm_head_bias",
        "head_dim",
        "intermediate_size",
        "hidden_size",
        "vocab_size",
        "n_inner",
        "num_attention_heads",
        "num_key_value_heads",
        "num_hidden_layers",
        "num_local_experts",
        "num_experts",
        "n_routed_experts",
        "expand",
        "mamba_expand",
        "lru_width",
        "conv1d_width",
        "tie_word_embeddings",
        "qk_layernorm",
        "qk_norm",
        "post_norm",
        "q_lora_rank",
        "v_head_dim",
        "qk_head_dim",
        "decoder_sparse_step",
        "mlp_only_layers",
        "moe_layers",
        "interleave_moe_layer_step",
        "first_k_dense_replace",
        "short_conv_kernel_size",
        "linear_conv_kernel_dim",
        "linear_head_dim",
        "linear_num_heads",
        "num_experts_per_token",
        "num_sliding_attention_heads",
        "add_cross_attention",
        "swa_num_attention_heads",
    ]
)
NO_EFFECT = frozenset(
    # Training, generation, bookkeeping, precision and speed of other implementations.
    [
        "_name_or_path",
        "architectures",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "model_type",
        "chunk_size_feed_forward",
        "id2label",
        "label2id",
        "problem_type",
        "num_labels",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "is_encoder_decoder",
        "is_decoder",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "eod_token_id",
        "sep_token_id",
        "use_cache",
        "initializer_range",
        "pretraining_tp",
        "attention_dropout",
        "hidden_dropout",
        "residual_dropout",
        "embedding_dropout",
        "attn_pdrop",
        "embd_pdrop",
        "emb_pdrop",
        "resid_pdrop",
        "classifier_dropout",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "output_router_logits",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "input_jitter_noise",
        "rescale_prenorm_residual",
        "residual_in_fp32",
        "time_step_min",
        "time_step_max",
        "time_step_floor",
        "time_step_scale",
        "time_step_init_scheme",
        "use_associative_scan",
        "use_mambapy",
        "use_mamba_kernels",
        "mamba_ssm_cache_dtype",
        "chunk_size",
        "mamba_chunk_size",
        "block_size",
        "reorder_and_upcast_attn",
        "attention_softmax_in_fp32",
        "scale_attention_softmax_in_fp32",
        "num_logits_to_keep",
        "num_nextn_predict_layers",
        "mtp_layer_types",
        "mtp_mlp_layer_types",
        "mtp_layers_block_type",
        "mtp_loss_scaling_factor",
        "model_max_length",
        "max_seq_len",
        "original_max_position_embeddings",
        "w_init_variance_scale",
        "final_w_init_variance_scale",
        "linear_a_log_min",
        "linear_a_log_max",
        "linear_dt_min",
        "linear_dt_max",
        "linear_dt_init_floor",
        "moe_shared_expert_overlap",
        "initializer_factor",
        "tie_last_hidden_states",
        "layer_norm_elementwise_affine",
        "_sliding_window_pattern",
        "image_token_id",
        "video_token_id",
        "vision_start_token_id",
        "vision_end_token_id",
        "per_layer_config",
        "vocab_size_per_layer_input",
    ]
)
KNOWN_TO_NEITHER = frozenset(
    # Families whose text is not served from this configuration: encoders, and parts of them.
    {"pixtral"}
)


def both() -> Iterator[str]:
    """Model types that transformers has a configuration and mlx-lm a module for."""
    modules = {path.stem for path in (Path(mlx_lm.__file__).parent / "models").glob("*.py")}
    for kind in sorted(set(CONFIG_MAPPING) & {*modules, *MODEL_REMAPPING}):
        if kind not in KNOWN_TO_NEITHER:
            yield kind


def as_saved(kind: str, **fields: Any) -> dict[str, Any]:
    """config.json as `save_pretrained` writes it for the family's defaults and these fields."""
    return json.loads(CONFIG_MAPPING[kind](**fields).to_json_string(use_diff=False))


def dropped(plan: Plan) -> list[str]:
    """Declared fields that nobody reads and no list explains."""
    explained = {*plan.family.reads, *CHECKED, *MAPPED, *SHAPES, *NO_EFFECT, *plan.said.names}
    return sorted(plan.said.declared - explained)


def main() -> int:
    found = 0
    for kind in sys.argv[1:] or both():
        plan = plan_of(as_saved(kind), MODEL_REMAPPING)
        unread = plan.said.declared - plan.family.reads
        for title, names in (
            ("mapped", unread & MAPPED),
            ("checked", unread & CHECKED),
            ("DROPPED", set(dropped(plan))),
            ("refused", set(plan.refusals)),
        ):
            if names:
                sys.stdout.write(f"{kind}: {title}: {', '.join(sorted(names))}\n")
        found += len(dropped(plan))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
