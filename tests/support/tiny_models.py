"""Tiny random-weight models on disk, one for each way mlx-lm caches a sequence, and adapters that fit them.

`build("qwen3", directory)` writes config.json, model.safetensors (float32) and a byte-level tokenizer;
`mlx_lm.load(directory)` and `AutoTokenizer.from_pretrained(directory)` read them. Same arguments, same bytes.
The weights are drawn so that attention looks back, norms and biases are not trivial, and the next-token distribution
is peaked without being certain: a wrong mask, offset, position or transpose changes the numbers visibly.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from adapters.spec import experts_of, place_of

VOCAB_SIZE = 320
"""Of the models. The tokenizer knows fewer ids, as padded vocabularies of real models do."""
LOGIT_STD = 2.3
"""Standard deviation of the logits over the vocabulary: entropy near 3 nats, largest near 8."""
SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>")
MERGES = (
    "t h, th e, i n, a n, e r, o n, r e, Ġ the, Ġ a, Ġ t, an d, in g, Ġ and, o u, Ġ s, h e, l l, o r, Ġ w, e n, "
    "Ġ c, i t, i s, l o, Ġ o, Ġo f, w o, l d, er e"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|assistant|>' if message['role'] == 'assistant' else '<|user|>' }}{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

SHARED: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
}
MOE: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
FALCON_FACTORS = [
    f"{part}_multiplier"
    for part in ("attention_in", "attention_out", "embedding", "key", "lm_head", "ssm_in", "ssm_out")
]
MAMBA: dict[str, Any] = {
    "mamba_expand": 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_n_groups": 1,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}

FAMILIES: dict[str, dict[str, Any]] = {
    # Plain attention: KVCache in every layer.
    "qwen3": {"model_type": "qwen3", "head_dim": 24, "tie_word_embeddings": True},
    "llama": {"model_type": "llama", "head_dim": 24, "attention_bias": True, "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "phi3": {"model_type": "phi3", "original_max_position_embeddings": 2048, "tie_word_embeddings": False},
    "qwen3_moe": {"model_type": "qwen3_moe", "head_dim": 24, "tie_word_embeddings": False, **MOE},
    # KVCache, but the attention soft cap does not broadcast an array mask over grouped heads: one row at a time.
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 24,
        "attn_logit_softcapping": 20.0,
        "final_logit_softcapping": 15.0,
        "query_pre_attn_scalar": 24,
    },
    # Sliding windows: RotatingKVCache in some layers, KVCache in others.
    "gemma3_text": {
        "model_type": "gemma3_text",
        "head_dim": 24,
        "query_pre_attn_scalar": 24,
        "sliding_window": 16,
        "sliding_window_pattern": 2,
    },
    "llama_sliding": {
        "model_type": "llama",
        "head_dim": 24,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": False,
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "head_dim": 24,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 1024,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
    },
    # Recurrent: ArraysCache in every layer.
    "mamba2": {
        "model_type": "mamba2",
        "expand": 2,
        "num_heads": 8,
        "head_dim": 16,
        "state_size": 16,
        "layer_norm_epsilon": 1e-5,
        "conv_kernel": 4,
        "n_groups": 1,
        "use_bias": False,
        "use_conv_bias": True,
        "tie_word_embeddings": True,
        "time_step_limit": [0.001, 100.0],
        "time_step_rank": "auto",
    },
    # Hybrids: ArraysCache and KVCache side by side; in falcon_h1 both in one layer (CacheList).
    "granitemoehybrid": {
        "model_type": "granitemoehybrid",
        "attention_bias": False,
        "embedding_multiplier": 1.0,
        "attention_multiplier": 0.25,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "layer_types": ["mamba", "attention"],
        "shared_intermediate_size": 96,
        # As dense checkpoints write it: transformers takes eight where nothing is said.
        "num_local_experts": 0,
        "tie_word_embeddings": True,
        **MAMBA,
    },
    "falcon_h1": {
        "model_type": "falcon_h1",
        "head_dim": 24,
        "mamba_d_ssm": 128,
        "tie_word_embeddings": False,
        # With other factors, as published checkpoints have them, no version is served.
        **dict.fromkeys(FALCON_FACTORS, 1.0),
        "mlp_multipliers": [1.0, 1.0],
        "ssm_multipliers": [1.0] * 5,
        **MAMBA,
    },
    "qwen3_next": {
        "model_type": "qwen3_next",
        "head_dim": 24,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "shared_expert_intermediate_size": 48,
        "partial_rotary_factor": 0.5,
        "full_attention_interval": 2,
        "tie_word_embeddings": False,
        **MOE,
    },
    # Recurrent, and of this project.
    "lstm": {"model_type": "lstm", "embedding_size": 48},
    "xlstm": {"model_type": "xlstm", "num_heads": 4, "chunk_size": 8, "ffn_proj_factor": 1.5},
}

OURS = frozenset({"lstm", "xlstm"})
"""Families that mlx-lm lacks."""


def build(family: str, directory: Path, seed: int = 0, **overrides: Any) -> Path:
    """Write the tiny model `family` (a key of `FAMILIES`) into `directory`, made if missing, and return it.

    `overrides` replace fields of config.json (`num_hidden_layers=2`, `vocab_size=512`, …). Weights are float32.
    """
    if family not in FAMILIES:
        raise ValueError(f"No tiny model is called {family!r}; there are {', '.join(FAMILIES)}.")
    directory.mkdir(parents=True, exist_ok=True)
    special = write_tokenizer(directory)
    config = {**SHARED, **FAMILIES[family], "eos_token_id": special["<|end|>"], "pad_token_id": special["<|pad|>"]}
    config |= {"dtype": "float32", **overrides}
    if config["vocab_size"] <= max(special.values()):
        raise ValueError(f"vocab_size must exceed the tokenizer's largest id, {max(special.values())}.")
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    save_file(random_weights(config, seed), directory / "model.safetensors", metadata={"format": "mlx"})
    return directory


def random_weights(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Float32 tensors by parameter path for the mlx-lm class that `config` names, logits scaled to `LOGIT_STD`."""
    package = "rollout_server.models.recurrent" if config["model_type"] in OURS else "mlx_lm.models"
    module = importlib.import_module(f"{package}.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(config))
    if config["model_type"] == "gemma3_text":
        model.sanitize({})  # Drops the untied head, as loading tied weights does.
    generator = np.random.default_rng(seed)
    shapes = sorted((name, tuple(leaf.shape)) for name, leaf in tree_flatten(model.parameters()))
    gemma = config["model_type"].startswith("gemma")
    weights = {name: _draw(name, shape, generator, gemma) for name, shape in shapes}
    model.update(tree_unflatten([(name, mx.array(value)) for name, value in weights.items()]))
    model.eval()
    probe = mx.array(generator.integers(0, config["vocab_size"], size=(1, 48)))
    spread = float(mx.mean(mx.std(model(probe), axis=-1)))
    # Rounded to a coarse grid, so that the last bits of a BLAS cannot change the weights.
    gain = 2.0 ** (round(8 * math.log2(LOGIT_STD / spread)) / 8)
    norms = (
        n for n in weights if re.fullmatch(r"\w+\.(norm|norm_f|final_layernorm|embedding_norm|out_norm)\.weight", n)
    )
    last = next(norms, "lm_head.weight")
    one = 1.0 if gemma else 0.0  # Gemma multiplies by 1 + weight.
    weights[last] = ((weights[last] + one) * gain - one).astype(np.float32)
    return weights


def _draw(name: str, shape: tuple[int, ...], generator: np.random.Generator, gemma: bool) -> np.ndarray:
    """One tensor; what it is for is read from its name."""
    normal = generator.standard_normal(shape)
    if name.endswith("A_log"):
        value = np.log(np.arange(1, shape[0] + 1)) + 0.1 * normal
    elif name.endswith(("dt_bias", ".sinks")):
        value = 0.3 * normal
    elif name.endswith((".bias", "_bias")):
        value = 0.2 * normal
    elif len(shape) == 1:  # A norm, or the skip weight D.
        value = 0.2 * normal + (0.0 if gemma else 1.0)
    elif "embed" in name:
        value = 0.2 * normal / (math.sqrt(shape[1]) if gemma else 1.0)  # Gemma multiplies by √hidden.
    elif "conv" in name:  # [channels, kernel, 1]
        value = normal / math.sqrt(shape[1])
    elif re.search(r"\b(q|k)_proj\.weight", name):
        value = 1.7 * normal / math.sqrt(shape[-1])  # Attention that chooses, instead of averaging.
    else:
        value = normal / math.sqrt(shape[-1])
    return value.astype(np.float32)


def write_tokenizer(directory: Path) -> dict[str, int]:
    """Write tokenizer.json and tokenizer_config.json: every byte, a few merges, `SPECIAL_TOKENS`. Returns their ids."""
    merges = [(pair.split()[0], pair.split()[1]) for pair in MERGES.split(", ")]
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": SHARED["max_position_embeddings"],
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return {text: tokenizer.token_to_id(text) for text in SPECIAL_TOKENS}


def linear_layers(directory: Path) -> dict[str, tuple[int, int]]:
    """Parameter path → (out, in) of every plain linear layer stored under `directory`, without loading the model."""
    weights = load_file(directory / "model.safetensors")
    return {
        name.removesuffix(".weight"): (value.shape[0], value.shape[1])
        for name, value in sorted(weights.items())
        if name.endswith(".weight") and value.ndim == 2 and "embed" not in name
    }


def random_adapter(
    model_layers: Mapping[str, tuple[int, int]],
    rank: int,
    seed: int,
    scale: float = 2.0,
    kind: Literal["peft", "mlx"] = "peft",
    *,
    targets: Sequence[str] | None = None,
    rslora: bool = False,
    dora: bool = False,
    strength: float = 0.5,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A LoRA or DoRA adapter as the file format `kind` writes it: (float32 tensors by name, adapter_config).

    `model_layers` holds all adaptable layers of the model: path → (out, in). `targets` are last name components
    (`q_proj`, `embed_tokens`); all linear layers by default. The same arguments with another `kind` give the same
    adapter in the other format, but that PEFT has none on stacked experts.
    ‖scale · B · A · x‖ is about `strength` times ‖x‖ whatever the scale and rank.
    """
    if kind not in ("peft", "mlx"):
        raise ValueError(f"{kind!r} is no format of a file: it is 'peft' or 'mlx', and dora=True makes a DoRA adapter.")
    last = {path: path.rsplit(".", 1)[-1] for path in model_layers}
    chosen = {
        path: shape
        for path, shape in sorted(model_layers.items())
        if (place_of(shape) == "linear" if targets is None else last[path] in targets)
        and (kind == "mlx" or place_of(shape) != "experts")
    }
    if not chosen:
        raise ValueError(f"No layer of the model is called any of {targets}.")
    generator = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for path, (out, width) in chosen.items():
        experts = experts_of(model_layers[path])
        a = (generator.standard_normal((*experts, rank, width)) / math.sqrt(width)).astype(np.float32)
        b = generator.standard_normal((*experts, out, rank)) * strength / (scale * math.sqrt(rank))
        b = b.astype(np.float32)
        if "embedding" in place_of(model_layers[path]):
            a *= np.float32(math.sqrt(width))  # A column is what one token reads.
        tensors |= _named(path, model_layers[path], a, b, kind)
    config = (
        _peft_config(chosen, rank, scale, rslora) if kind == "peft" else _mlx_config(chosen, model_layers, rank, scale)
    )
    if dora:  # Drawn last, so that A and B are those of the LoRA adapter.
        config |= {"use_dora": True} if kind == "peft" else {"fine_tune_type": "dora"}
        for path, (out, _) in chosen.items():
            name = f"base_model.model.{path}.lora_magnitude_vector" if kind == "peft" else f"{path}.m"
            tensors[name] = np.exp(0.3 * generator.standard_normal(out)).astype(np.float32)
    return tensors, config


def _named(path: str, shape: tuple[int, int], a: np.ndarray, b: np.ndarray, kind: str) -> dict[str, np.ndarray]:
    """A [rank, in] and B [out, rank] as the file format stores them."""
    if kind == "peft":
        part = "lora_embedding_{}" if "embedding" in place_of(shape) else "lora_{}.weight"
        return {f"base_model.model.{path}.{part.format(half)}": value for half, value in (("A", a), ("B", b))}
    turned = not experts_of(shape)
    halves = {"a": a, "b": b}
    return {f"{path}.lora_{half}": np.ascontiguousarray(v.T) if turned else v for half, v in halves.items()}


def save_adapter(directory: Path, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> Path:
    """Write an adapter directory with the file names its format uses, and return it."""
    directory.mkdir(parents=True, exist_ok=True)
    name = "adapter_model.safetensors" if "peft_type" in config else "adapters.safetensors"
    save_file(tensors, directory / name)
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return directory


def _peft_config(chosen: Mapping[str, Any], rank: int, scale: float, rslora: bool) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": scale * (math.sqrt(rank) if rslora else rank),
        "lora_dropout": 0.0,
        "use_rslora": rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": sorted({path.rsplit(".", 1)[-1] for path in chosen}),
    }


def _mlx_config(chosen: Mapping[str, Any], layers: Mapping[str, Any], rank: int, scale: float) -> dict[str, Any]:
    numbered = re.compile(r"^.*?\blayers\.(\d+)\.")
    indices = [int(match[1]) for path in layers if (match := numbered.match(path))]
    return {
        "fine_tune_type": "lora",
        "num_layers": max(indices, default=-1) + 1,
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": 0.0,
            "keys": sorted({numbered.sub("", path) for path in chosen}),
        },
    }
