"""Tiny vision models as transformers saves them, one for every family, and what torch computes with them in float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from tests.support.tiny_models import VOCAB_SIZE

PLACEHOLDER, VIDEO, BEGIN, END = 289, 290, 291, 292
"""The first ids behind those of the tiny tokenizer."""
STOP = 286
LANGUAGE = r".*(?:language_model|text_model).*\.(?:q_proj|v_proj|down_proj)"
"""Layers of the language half, by their names in PEFT."""
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": STOP,
    "pad_token_id": None,
}
QWEN: dict[str, Any] = {
    "image_token_id": PLACEHOLDER,
    "video_token_id": VIDEO,
    "vision_start_token_id": BEGIN,
    "vision_end_token_id": END,
    "tie_word_embeddings": False,
}
LAYERS: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
PIXTRAL: dict[str, Any] = {
    **LAYERS,
    "model_type": "pixtral",
    "image_size": 64,
    "patch_size": 4,
    "head_dim": 16,
}
MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 50_000.0, "mrope_section": [1, 1, 2]}
GRIDS = ((1, 6, 8), (1, 4, 4))


@dataclass(frozen=True)
class Vision:
    kind: str
    """`model_type`."""
    config: dict[str, Any]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    """Of the pixels of two pictures."""
    grids: tuple[tuple[int, ...], tuple[int, ...]]
    tokens: tuple[int, int]
    around: tuple[int, int] = (BEGIN, END)
    row: int = 0
    """Placeholders behind which a token of their own stands; 0 where they stand together."""
    extra: dict[str, Any] = field(default_factory=dict)


_PATCHES = ((48, 96), (16, 96))
VISIONS: dict[str, Vision] = {
    "qwen2_vl": Vision(
        "qwen2_vl",
        {
            **QWEN,
            "text_config": {**TEXT, "rope_parameters": MROPE},
            "vision_config": {
                "depth": 2, "embed_dim": 32, "mlp_ratio": 2, "num_heads": 2, "patch_size": 4, "hidden_size": 32,
            },
        },
        _PATCHES, GRIDS, (12, 4),
    ),
    "qwen2_5_vl": Vision(
        "qwen2_5_vl",
        {
            **QWEN,
            "text_config": {**TEXT, "rope_parameters": MROPE},
            "vision_config": {
                "depth": 3, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "patch_size": 4,
                "window_size": 16, "out_hidden_size": 32, "fullatt_block_indexes": [1],
            },
        },
        _PATCHES, GRIDS, (12, 4),
    ),
    "qwen3_vl": Vision(
        "qwen3_vl",
        {
            **QWEN,
            "text_config": {
                **TEXT, "head_dim": 16, "num_hidden_layers": 3,
                "rope_parameters": {**MROPE, "mrope_section": [4, 2, 2], "mrope_interleaved": True},
            },
            "vision_config": {
                "depth": 3, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "patch_size": 4,
                "out_hidden_size": 32, "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 2],
            },
        },
        _PATCHES, GRIDS, (12, 4),
    ),
    "qwen3_vl_moe": Vision(
        "qwen3_vl_moe",
        {
            **QWEN,
            "text_config": {
                **TEXT, "head_dim": 16, "num_hidden_layers": 3, "num_experts": 4, "num_experts_per_tok": 2,
                "moe_intermediate_size": 24, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
                "rope_parameters": {**MROPE, "mrope_section": [4, 2, 2], "mrope_interleaved": True},
            },
            "vision_config": {
                "depth": 3, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "patch_size": 4,
                "out_hidden_size": 32, "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 2],
            },
        },
        _PATCHES, GRIDS, (12, 4),
    ),
    "gemma3": Vision(
        "gemma3",
        {
            "text_config": {
                **TEXT, "hidden_size": 36, "head_dim": 8, "num_hidden_layers": 3, "sliding_window": 12,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                "sliding_window_pattern": 2, "query_pre_attn_scalar": 8,
            },
            "vision_config": {**LAYERS, "image_size": 32, "patch_size": 4},
            "mm_tokens_per_image": 16, "image_token_index": PLACEHOLDER, "boi_token_index": BEGIN,
            "eoi_token_index": END,
        },
        ((3, 32, 32), (3, 32, 32)), ((8, 8), (8, 8)), (16, 16),
    ),
    "llava": Vision(
        "llava",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": {
                **LAYERS, "num_hidden_layers": 3, "model_type": "clip_vision_model", "image_size": 32, "patch_size": 8,
            },
            "image_token_index": PLACEHOLDER,
        },
        ((3, 32, 32), (3, 32, 32)), ((4, 4), (4, 4)), (16, 16),
    ),
    "mistral3": Vision(
        "mistral3",
        {
            "text_config": {**TEXT, "model_type": "mistral", "head_dim": 8},
            "vision_config": PIXTRAL, "image_token_index": PLACEHOLDER, "tie_word_embeddings": False,
            "vision_feature_layer": -1,
        },
        ((3, 24, 32), (3, 16, 8)), ((6, 8), (4, 2)), (12, 2), row=4,
    ),
    "pixtral": Vision(
        "llava",
        {
            "text_config": {**TEXT, "model_type": "mistral", "head_dim": 8},
            "vision_config": PIXTRAL, "image_token_index": PLACEHOLDER,
            "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
        },
        ((3, 12, 16), (3, 16, 8)), ((3, 4), (4, 2)), (12, 8), row=4,
    ),
    "idefics3": Vision(
        "idefics3",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": {**LAYERS, "image_size": 32, "patch_size": 4},
            "image_token_id": PLACEHOLDER, "scale_factor": 2,
        },
        ((3, 3, 32, 32), (1, 3, 32, 32)), ((1, 2), (0, 0)), (48, 16), row=16,
    ),
    "smolvlm": Vision(
        "smolvlm",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": {**LAYERS, "image_size": 32, "patch_size": 4},
            "image_token_id": PLACEHOLDER, "scale_factor": 2,
        },
        ((3, 3, 32, 32), (1, 3, 32, 32)), ((1, 2), (0, 0)), (48, 16), row=16,
    ),
}  # fmt: skip


def build(name: str, directory: Path, *, seed: int = 3) -> PreTrainedModel:
    """A model with random float16 values, saved as transformers saves it, and as it reads it in float32."""
    vision = VISIONS[name]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(vision.kind, **vision.config)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.ndim > 1:
                scale = 0.15 if value.ndim > 2 else value.shape[-1] ** -0.5
                value.normal_(0, scale)
            else:
                value.normal_(0 if key.endswith("bias") or name == "gemma3" else 1, 0.1)
    model.half().save_pretrained(directory)
    return load(directory)


def adapted(directory: Path, target: str | list[str] = LANGUAGE, *, dora: bool = False, seed: int = 4) -> PeftModel:
    """The saved model with an adapter of PEFT that says something, and whose values float16 has."""
    torch.manual_seed(seed)
    model = get_peft_model(load(directory), LoraConfig(r=4, lora_alpha=8, target_modules=target, use_dora=dora))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(0, 0.3)
            if "lora_" in name:
                value.copy_(value.half().float())
    return model.eval()


def load(directory: Path) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()


def pixels_of(name: str, seed: int = 5) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.standard_normal(shape).astype(np.float32) for shape in VISIONS[name].shapes]


def conversations(name: str, seed: int = 7) -> dict[str, tuple[list[int], list[int]]]:
    """Token ids, and which pictures stand in them in this order: none, one in front, two, one between."""
    generator = np.random.default_rng(seed)

    def words(count: int) -> list[int]:
        return [int(word) for word in generator.integers(0, 256, count)]

    def picture(number: int) -> list[int]:
        vision = VISIONS[name]
        count, row = vision.tokens[number], vision.row or vision.tokens[number]
        parts = [[PLACEHOLDER] * min(row, count - at) for at in range(0, count, row)]
        joined = parts[0] + [token for part in parts[1:] for token in (284, *part)]
        return [vision.around[0], *joined, vision.around[1]]

    return {
        "none": (words(23), []),
        "one": ([*picture(0), *words(9)], [0]),
        "two": ([*words(3), *picture(1), *words(5), *picture(0), *words(4)], [1, 0]),
        "middle": ([*words(21), *picture(0), *words(13)], [0]),
    }


def _inputs(name: str, pixels: Sequence[np.ndarray], grids: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Pictures as the family's model takes them."""
    arrays = [torch.from_numpy(array) for array in pixels]
    if not arrays:
        return {}
    match VISIONS[name].kind:
        case "qwen2_vl" | "qwen2_5_vl" | "qwen3_vl" | "qwen3_vl_moe":
            return {"pixel_values": torch.cat(arrays), "image_grid_thw": torch.tensor([list(grid) for grid in grids])}
        case "mistral3" | "llava" if name != "llava":
            high, wide = (max(array.shape[axis] for array in arrays) for axis in (1, 2))
            padded = torch.zeros(len(arrays), 3, high, wide)
            for at, array in enumerate(arrays):
                padded[at, :, : array.shape[1], : array.shape[2]] = array
            sizes = torch.tensor([[array.shape[1], array.shape[2]] for array in arrays])
            return {"pixel_values": padded, "image_sizes": sizes}
        case "idefics3" | "smolvlm":
            return {"pixel_values": torch.cat(arrays)[None]}
    return {"pixel_values": torch.stack(arrays)}


def features(model: PreTrainedModel, name: str) -> dict[str, np.ndarray]:
    """Features of each picture by itself, and what is added behind the first layers."""
    found: dict[str, np.ndarray] = {}
    vision = VISIONS[name]
    for number, (pixels, grid) in enumerate(zip(pixels_of(name), vision.grids, strict=True)):
        given = _inputs(name, [pixels], [grid])
        layer = (
            {"vision_feature_layer": model.config.vision_feature_layer} if vision.kind in ("llava", "mistral3") else {}
        )
        if vision.kind == "llava":
            layer["vision_feature_select_strategy"] = model.config.vision_feature_select_strategy
        with torch.no_grad():
            made = model.model.get_image_features(**given, **layer, return_dict=True)
        pooled = made.pooler_output
        found[f"features.{number}"] = torch.cat(list(pooled)).reshape(-1, pooled[0].shape[-1]).numpy()
        for at, added in enumerate(getattr(made, "deepstack_features", None) or ()):
            found[f"deepstack.{number}.{at}"] = torch.cat(list(added)).numpy()
    return found


def read(model: PreTrainedModel, name: str, ids: Sequence[int], pictures: Sequence[int]) -> Mapping[str, np.ndarray]:
    """Log-probabilities of the tokens behind the first, the logits behind the last, and positions on three axes."""
    vision, all_pixels = VISIONS[name], pixels_of(name)
    tokens = torch.tensor([list(ids)])
    kinds = (tokens == PLACEHOLDER).int()
    given = _inputs(name, [all_pixels[at] for at in pictures], [vision.grids[at] for at in pictures])
    found: dict[str, np.ndarray] = {}
    if vision.kind.startswith("qwen"):
        given["mm_token_type_ids"] = kinds
        positions, _ = model.model.get_rope_index(tokens, kinds, given.get("image_grid_thw"))
        found["positions"] = positions[:, 0].numpy().astype(np.int32)
    elif vision.kind == "gemma3" and pictures:
        given["token_type_ids"] = kinds
    with torch.no_grad():
        logits = model(input_ids=tokens, **given).logits[0]
    chosen = torch.log_softmax(logits[:-1].double(), -1).gather(1, tokens[0, 1:, None])[:, 0]
    return {**found, "logprobs": chosen.float().numpy(), "logits": logits[-1].numpy()}
