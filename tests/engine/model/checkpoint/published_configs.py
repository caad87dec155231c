"""config.json of published checkpoints, as far as they say something about the forward pass: written down from the
files as their authors published them, mostly with transformers 4."""

from __future__ import annotations

from typing import Any

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def dense(
    kind: str, hidden: int, wide: int, heads: int, kv: int, vocab: int, longest: int, **more: Any
) -> dict[str, Any]:
    """The fields that nearly all have."""
    return {
        "architectures": ["CausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "num_hidden_layers": 32,
        "vocab_size": vocab,
        "max_position_embeddings": longest,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.0",
        "use_cache": True,
        **more,
    }


SMALL_LONGROPE = {"long_factor": [1.5] * 48, "short_factor": [1.0] * 48, "type": "longrope"}
GEMMA = {"head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-06, "attention_bias": False}
QWEN = {"rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "use_sliding_window": False}

PUBLISHED: dict[str, tuple[dict[str, Any], int | None]] = {
    # name → (config.json, how many tokens are exact; None for all)
    "Llama-2-7b": (
        dense("llama", 4096, 11008, 32, 32, 32000, 4096, pretraining_tp=1, rope_scaling=None),
        None,
    ),
    "Llama-3.1-8B": (
        dense(
            "llama", 4096, 14336, 32, 8, 128256, 131072, rope_theta=500000.0, rope_scaling=LLAMA3, mlp_bias=False,
            attention_bias=False, pretraining_tp=1,
        ),
        None,
    ),
    "Llama-3.2-1B": (
        dense(
            "llama", 2048, 8192, 32, 8, 128256, 131072, head_dim=64, rope_theta=500000.0, tie_word_embeddings=True,
            rope_scaling={**LLAMA3, "factor": 32.0},
        ),
        None,
    ),
    "Mistral-7B-v0.1": (dense("mistral", 4096, 14336, 32, 8, 32000, 32768, sliding_window=4096), 4096),
    "Mistral-7B-v0.3": (
        dense("mistral", 4096, 14336, 32, 8, 32768, 32768, sliding_window=None, rope_theta=1000000.0),
        None,
    ),
    "Mixtral-8x7B-v0.1": (
        dense(
            "mixtral", 4096, 14336, 32, 8, 32000, 32768, sliding_window=None, rope_theta=1000000.0,
            num_local_experts=8, num_experts_per_tok=2, output_router_logits=False, router_aux_loss_coef=0.02,
        ),
        None,
    ),
    "Qwen2-7B": (
        dense("qwen2", 3584, 18944, 28, 4, 152064, 131072, **QWEN, sliding_window=131072, max_window_layers=28),
        None,
    ),
    "Qwen2.5-0.5B-Instruct": (
        dense(
            "qwen2", 896, 4864, 14, 2, 151936, 32768, **{**QWEN, "tie_word_embeddings": True}, sliding_window=32768,
            max_window_layers=21,
        ),
        None,
    ),
    "Qwen3-4B": (
        dense(
            "qwen3", 2560, 9728, 32, 8, 151936, 40960, **QWEN, head_dim=128, sliding_window=None, rope_scaling=None,
            max_window_layers=36, attention_bias=False,
        ),
        None,
    ),
    "Qwen3-30B-A3B": (
        dense(
            "qwen3_moe", 2048, 6144, 32, 4, 151936, 40960, **QWEN, head_dim=128, sliding_window=None,
            decoder_sparse_step=1, mlp_only_layers=[], moe_intermediate_size=768, norm_topk_prob=True,
            num_experts=128, num_experts_per_tok=8, max_window_layers=48, rope_scaling=None,
        ),
        None,
    ),
    "Qwen3-Next-80B-A3B": (
        dense(
            "qwen3_next", 2048, 5120, 16, 2, 151936, 262144, head_dim=256, rope_theta=10000000, rope_scaling=None,
            partial_rotary_factor=0.25, full_attention_interval=4, linear_conv_kernel_dim=4, linear_key_head_dim=128,
            linear_num_key_heads=16, linear_num_value_heads=32, linear_value_head_dim=128, decoder_sparse_step=1,
            mlp_only_layers=[], moe_intermediate_size=512, norm_topk_prob=True, num_experts=512,
            num_experts_per_tok=10, shared_expert_intermediate_size=512, use_sliding_window=False,
        ),
        None,
    ),
    "Qwen1.5-MoE-A2.7B": (
        dense(
            "qwen2_moe", 2048, 5632, 16, 16, 151936, 8192, **QWEN, sliding_window=32768, max_window_layers=21,
            decoder_sparse_step=1, moe_intermediate_size=1408, shared_expert_intermediate_size=5632, num_experts=60,
            num_experts_per_tok=4, norm_topk_prob=False,
        ),
        None,
    ),
    "gemma-2b": (dense("gemma", 2048, 16384, 8, 1, 256000, 8192, **{**GEMMA, "hidden_act": "gelu"}), None),
    "gemma-2-2b": (
        dense(
            "gemma2", 2304, 9216, 8, 4, 256000, 8192, **GEMMA, attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0, query_pre_attn_scalar=256, sliding_window=4096, cache_implementation="hybrid",
        ),
        4096,
    ),
    "gemma-3-1b-it": (
        dense(
            "gemma3_text", 1152, 6912, 4, 1, 262144, 32768, **GEMMA, rope_local_base_freq=10000, rope_scaling=None,
            query_pre_attn_scalar=256, sliding_window=512, sliding_window_pattern=6, attn_logit_softcapping=None,
            final_logit_softcapping=None,
        ),
        None,
    ),
    "phi-2": (
        dense(
            "phi", 2560, 10240, 32, 32, 51200, 2048, hidden_act="gelu_new", layer_norm_eps=1e-05,
            partial_rotary_factor=0.4, qk_layernorm=False, resid_pdrop=0.1, embd_pdrop=0.0, rope_scaling=None,
        ),
        None,
    ),
    "Phi-3-mini-4k-instruct": (
        dense(
            "phi3", 3072, 8192, 32, 32, 32064, 4096, original_max_position_embeddings=4096, rope_scaling=None,
            sliding_window=2047, resid_pdrop=0.0, embd_pdrop=0.0, attention_bias=False,
        ),
        2047,
    ),
    "Phi-3-mini-128k-instruct": (
        dense(
            "phi3", 3072, 8192, 32, 32, 32064, 131072, original_max_position_embeddings=4096,
            rope_scaling=SMALL_LONGROPE, sliding_window=262144,
        ),
        4096,
    ),
    "phi-4": (
        dense(
            "phi3", 5120, 17920, 40, 10, 100352, 16384, original_max_position_embeddings=16384, rope_scaling=None,
            rope_theta=250000, sliding_window=None,
        ),
        None,
    ),
    "OLMo-2-1124-7B": (dense("olmo2", 4096, 11008, 32, 32, 100352, 4096, rope_theta=500000, rope_scaling=None), None),
    "Olmo-3-7B": (
        dense(
            "olmo3", 4096, 11008, 32, 32, 100278, 65536, rope_theta=500000, sliding_window=4096,
            layer_types=["sliding_attention"] * 3 + ["full_attention"], num_hidden_layers=4,
            rope_scaling={
                "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
                "original_max_position_embeddings": 8192, "rope_type": "yarn",
            },
        ),
        None,
    ),
    "OLMoE-1B-7B": (
        dense(
            "olmoe", 2048, 1024, 16, 16, 50304, 4096, clip_qkv=None, norm_topk_prob=False, num_experts=64,
            num_experts_per_tok=8, rope_scaling=None, attention_bias=False,
        ),
        None,
    ),
    "gpt-oss-20b": (
        dense(
            "gpt_oss", 2880, 2880, 64, 8, 201088, 131072, attention_bias=True, head_dim=64, num_local_experts=32,
            num_experts_per_tok=4, experts_per_token=4, num_hidden_layers=4, rope_theta=150000, sliding_window=128,
            layer_types=["sliding_attention", "full_attention"] * 2, initial_context_length=4096, swiglu_limit=7.0,
            rope_scaling={
                "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
                "rope_type": "yarn", "truncate": False,
            },
        ),
        None,
    ),
    "DeepSeek-V2-Lite": (
        dense(
            "deepseek_v2", 2048, 10944, 16, 16, 102400, 163840, attention_bias=False, first_k_dense_replace=1,
            kv_lora_rank=512, moe_intermediate_size=1408, moe_layer_freq=1, n_group=1, n_routed_experts=64,
            n_shared_experts=2, norm_topk_prob=False, num_experts_per_tok=6, q_lora_rank=None, qk_nope_head_dim=128,
            qk_rope_head_dim=64, routed_scaling_factor=1.0, scoring_func="softmax", topk_group=1, topk_method="greedy",
            v_head_dim=128, seq_aux=True, aux_loss_alpha=0.001,
            rope_scaling={
                "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
                "original_max_position_embeddings": 4096, "type": "yarn",
            },
        ),
        None,
    ),
    "DeepSeek-V3": (
        dense(
            "deepseek_v3", 7168, 18432, 128, 128, 129280, 163840, attention_bias=False, first_k_dense_replace=3,
            kv_lora_rank=512, moe_intermediate_size=2048, moe_layer_freq=1, n_group=8, n_routed_experts=256,
            n_shared_experts=1, norm_topk_prob=True, num_experts_per_tok=8, num_nextn_predict_layers=1,
            q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64, routed_scaling_factor=2.5,
            scoring_func="sigmoid", topk_group=4, topk_method="noaux_tc", v_head_dim=128, ep_size=1,
            rope_scaling={
                "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 4096, "type": "yarn",
            },
        ),
        None,
    ),
    "GLM-4-9B-0414": (
        dense(
            "glm4", 4096, 13696, 32, 2, 151552, 32768, attention_bias=True, head_dim=128, partial_rotary_factor=0.5,
        ),
        None,
    ),
    "GLM-4.5-Air": (
        dense(
            "glm4_moe", 4096, 10944, 96, 8, 151552, 131072, attention_bias=True, head_dim=128, first_k_dense_replace=1,
            partial_rotary_factor=0.5, moe_intermediate_size=1408, n_group=1, n_routed_experts=128, n_shared_experts=1,
            norm_topk_prob=True, num_experts_per_tok=8, num_nextn_predict_layers=1, rope_scaling=None,
            rope_theta=1000000, routed_scaling_factor=1.0, topk_group=1, use_qk_norm=False,
        ),
        None,
    ),
    "granite-3.3-8b": (
        dense(
            "granite", 4096, 12800, 32, 8, 49159, 131072, attention_bias=False, attention_multiplier=0.0078125,
            embedding_multiplier=12.0, logits_scaling=16.0, residual_multiplier=0.22, mlp_bias=False,
            rope_scaling=None, rope_theta=10000000.0, tie_word_embeddings=True,
        ),
        None,
    ),
    "SmolLM3-3B": (
        dense(
            "smollm3", 2048, 11008, 16, 4, 128256, 65536, attention_bias=False, mlp_bias=False,
            no_rope_layer_interval=4,
            no_rope_layers=[1, 1, 1, 0] * 8, rope_scaling=None, rope_theta=5000000.0, sliding_window=None,
            use_sliding_window=False, max_window_layers=28, layer_types=["full_attention"] * 32, pretraining_tp=2,
            tie_word_embeddings=True,
        ),
        None,
    ),
    "c4ai-command-r-v01": (
        dense(
            "cohere", 8192, 22528, 64, 64, 256000, 8192, layer_norm_eps=1e-05, logit_scale=0.0625, use_qk_norm=False,
            rope_theta=8000000.0, model_max_length=131072, attention_bias=False,
        ),
        None,
    ),
    "c4ai-command-r7b-12-2024": (
        dense(
            "cohere2", 4096, 14336, 32, 8, 256000, 8192, head_dim=128, layer_norm_eps=1e-05, logit_scale=0.25,
            rope_theta=50000, rope_scaling=None, sliding_window=4096, sliding_window_pattern=4, layer_switch=4,
            position_embedding_type="rope_gptj", rotary_pct=1.0, use_embedding_sharing=True, use_gated_activation=True,
            use_parallel_block=True, use_parallel_embedding=False, use_qk_norm=False, order_of_interleaved_layers=None,
        ),
        None,
    ),
    "stablelm-2-1_6b": (
        dense(
            "stablelm", 2048, 5632, 32, 32, 100352, 4096, layer_norm_eps=1e-05, partial_rotary_factor=0.25,
            use_qkv_bias=True, use_parallel_residual=False, qk_layernorm=False, rope_scaling=None,
        ),
        None,
    ),
    "starcoder2-3b": (
        dense(
            "starcoder2", 3072, 12288, 24, 2, 49152, 16384, hidden_act="gelu_pytorch_tanh", norm_epsilon=1e-05,
            norm_type="layer_norm", mlp_type="default", sliding_window=4096, use_bias=True,
            rope_theta=999999.4420358813,
            residual_dropout=0.1, embedding_dropout=0.1,
        ),
        4096,
    ),
}  # fmt: skip
