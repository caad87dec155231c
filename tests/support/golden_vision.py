"""The checkpoints of tests/golden/vision as directories that can be opened, and the slow, obvious way through one: the
whole sequence at once, layer by layer, without caches."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer

from rollout_server.engine.model.vision.load import settled
from rollout_server.models.vision.family import Features, VisionFamily
from tests.support.tiny_models import write_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "vision"
FAMILIES = sorted(path.parent.name for path in GOLDEN.glob("*/reference.safetensors"))
CONVERSATIONS = ("none", "one", "two", "middle")
_QWEN = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
_ROWS = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
_TILES = ("<image>", "<fake_token_around_image>", "<global-img>", "<row_1_col_1>", "<row_1_col_2>", "<row_2_col_1>")
SPECIAL: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "qwen2_vl": _QWEN,
        "qwen2_5_vl": _QWEN,
        "qwen3_vl": _QWEN,
        "qwen3_vl_moe": _QWEN,
        "gemma3": ("<image_soft_token>", "<unused>", "<start_of_image>", "<end_of_image>"),
        "llava": ("<image>",),
        "pixtral": _ROWS,
        "mistral3": _ROWS,
        "idefics3": _TILES,
        "smolvlm": _TILES,
    }
)
"""Added behind the tiny tokenizer's own, as the golden configurations number them: what stands for pictures first."""
_FRAMED = "<|vision_start|><|image_pad|><|vision_end|>"
MARKS: Mapping[str, str] = MappingProxyType(
    {
        "qwen2_vl": _FRAMED,
        "qwen2_5_vl": _FRAMED,
        "qwen3_vl": _FRAMED,
        "qwen3_vl_moe": _FRAMED,
        "gemma3": "<start_of_image>",
    }
)
"""What a chat template writes for a picture, where it is not the first of these."""
TEMPLATE = (
    "{%% for message in messages %%}{{ '<|assistant|>' if message['role'] == 'assistant' else '<|user|>' }}"
    "{%% if message['content'] is string %%}{{ message['content'] }}{%% else %%}{%% for part in message['content'] %%}"
    "{{ '%s' if part['type'] == 'image' else part['text'] }}{%% endfor %%}{%% endif %%}<|end|>{%% endfor %%}"
    "{%% if add_generation_prompt %%}<|assistant|>{%% endif %%}"
)
_QWEN_PIXELS = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": 4,
    "merge_size": 2,
    "size": {"shortest_edge": 64, "longest_edge": 64 * 24},
}
_ROWS_PIXELS = {
    "image_processor_type": "PixtralImageProcessor",
    "patch_size": {"height": 4, "width": 4},
    "size": {"longest_edge": 32},
}
_TILES_PIXELS = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
PROCESSORS: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        "qwen2_vl": _QWEN_PIXELS,
        "qwen2_5_vl": _QWEN_PIXELS,
        "qwen3_vl": _QWEN_PIXELS,
        "qwen3_vl_moe": _QWEN_PIXELS,
        "gemma3": {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 32, "width": 32}},
        "llava": {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 32},
            "crop_size": {"height": 32, "width": 32},
        },
        "pixtral": _ROWS_PIXELS,
        "mistral3": _ROWS_PIXELS,
        "idefics3": {"image_processor_type": "Idefics3ImageProcessor", **_TILES_PIXELS},
        "smolvlm": {"image_processor_type": "SmolVLMImageProcessor", **_TILES_PIXELS},
    }
)
"""preprocessor_config.json, for pictures as small as the models."""


def copied(family: str, directory: Path, **changed: Any) -> Path:
    """A checkpoint with a tokenizer and an image processor in `directory`, made if missing. `changed` are fields of
    config.json, None for one that is taken away."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = load_file(GOLDEN / family / "model.safetensors")
    save_file({name: array.astype(np.float32) for name, array in tensors.items()}, directory / "model.safetensors")
    config = json.loads((GOLDEN / family / "config.json").read_text()) | changed
    (directory / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not None})
    )
    write_tokenizer(directory)
    path = str(directory / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL[family]])
    tokenizer.save(path)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings["chat_template"] = TEMPLATE % MARKS.get(family, SPECIAL[family][0])
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[family]))
    return directory


def config_of(family: str) -> dict[str, Any]:
    """config.json with transformers' defaults, as towers are made from it."""
    return settled(json.loads((GOLDEN / family / "config.json").read_text()))


@dataclass(frozen=True)
class Reference:
    """What torch computed."""

    arrays: dict[str, np.ndarray]

    @classmethod
    def of(cls, family: str) -> Reference:
        return cls(load_file(GOLDEN / family / "reference.safetensors"))

    def grid(self, number: int) -> tuple[int, ...]:
        return tuple(self.arrays[f"grid.{number}"].tolist())

    def pixels(self, number: int) -> np.ndarray:
        return self.arrays[f"pixels.{number}"]

    def ids(self, conversation: str) -> list[int]:
        found: list[int] = self.arrays[f"{conversation}.ids"].tolist()
        return found

    def pictures(self, conversation: str) -> list[int]:
        found: list[int] = self.arrays[f"{conversation}.pictures"].tolist()
        return found


@dataclass(frozen=True)
class AxesRope:
    """RoPE by positions on three axes, for the whole sequence; in the place of a layer's own, in a copy of a model that
    belongs to a test."""

    cos: mx.array
    sin: mx.array

    @classmethod
    def of(cls, positions: np.ndarray, axes: Sequence[int], theta: float) -> AxesRope:
        pairs = len(axes)
        frequencies = theta ** -(np.arange(pairs, dtype=np.float64) / pairs)
        angles = np.stack([positions[axis] * frequency for axis, frequency in zip(axes, frequencies, strict=True)], -1)
        return cls(mx.array(np.cos(angles).astype(np.float32)), mx.array(np.sin(angles).astype(np.float32)))

    def __call__(self, x: mx.array, offset: Any = 0) -> mx.array:
        first, second = mx.split(x, 2, axis=-1)
        return mx.concatenate([first * self.cos - second * self.sin, second * self.cos + first * self.sin], axis=-1)


def whole_logits(
    module: nn.Module, family: VisionFamily, ids: Sequence[int], features: Sequence[Features], grids: Any, theta: float
) -> np.ndarray:
    """float32 [N, vocabulary], of all positions at once."""
    text = module.language_model
    at = np.flatnonzero(np.array(ids) == family.placeholder)
    h = text.model.embed_tokens(mx.array(ids)[None])
    if features:
        h[0, mx.array(at)] = mx.concatenate([each.embeddings for each in features])
    scaled = family.sees_both_ways
    if scaled:
        h = h * mx.array(h.shape[-1] ** 0.5, mx.bfloat16).astype(h.dtype)
    deep = [mx.concatenate(layer) for layer in zip(*(each.deepstack for each in features), strict=True)]
    positions = family.positions(ids, grids)
    for number, layer in enumerate(text.model.layers):
        if positions is not None and family.axes is not None:
            layer.self_attn.rope = AxesRope.of(positions, family.axes, theta)
        window = getattr(text.model, "window_size", None) if getattr(layer.self_attn, "is_sliding", False) else None
        mask = allowed(ids, family, window)
        h = layer(h, mx.array(mask)[None, None], None)
        if number < len(deep):
            h[0, mx.array(at)] = h[0, mx.array(at)] + deep[number]
    h = text.model.norm(h)
    tied = "lm_head" not in text
    logits = text.model.embed_tokens.as_linear(h) if tied else text.lm_head(h)
    return np.array(logits[0].astype(mx.float32))


def allowed(ids: Sequence[int], family: VisionFamily, window: int | None) -> np.ndarray:
    """bool [N, N]: which key each query sees. Placeholders that stand together are one picture."""
    rows, columns = np.arange(len(ids))[:, None], np.arange(len(ids))[None]
    seen = columns <= rows
    if family.sees_both_ways:
        inside = np.array(ids) == family.placeholder
        block = np.where(inside, np.cumsum(inside & ~np.r_[False, inside[:-1]]), 0)
        seen = seen | ((block[:, None] == block[None]) & (block[:, None] > 0))
    return seen if window is None else seen & (columns > rows - window)
