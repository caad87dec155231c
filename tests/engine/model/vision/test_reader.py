"""A model's pictures on the host: pixels bit for bit those of transformers' own processor, which needs Pillow alone."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.image_utils import load_image
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor

from rollout_server.engine.model.checkpoint.files import read_config
from rollout_server.engine.model.vision.load import read_vision
from rollout_server.engine.model.vision.reader import ModelPictures, read_pictures
from rollout_server.models.vision.family import VisionFamily
from tests.laws.grids import some_long
from tests.support.golden_vision import FAMILIES, MARKS, SPECIAL, copied
from tests.support.pictures.files import READABLE, UNREADABLE, drawn, saved

LIMIT = 1_000_000
NAMES = {
    "gemma3": {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
    "llava": {"image_token": "<image>"},
}
"""What their processors ask a tokenizer for."""
PROCESSORS: dict[str, Callable[[Any, Any], Any]] = {
    "gemma3": partial(Gemma3Processor, image_seq_length=16),
    "idefics3": partial(Idefics3Processor, image_seq_len=16),
    "llava": partial(
        LlavaProcessor, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ),
}


def opened(family: str, directory: Path) -> tuple[ModelPictures, VisionFamily]:
    config = read_config(copied(family, directory))
    vision, tokenizer = read_vision(directory, config), AutoTokenizer.from_pretrained(directory)
    assert vision is not None
    pictures = read_pictures(directory, config, vision, tokenizer)
    assert pictures is not None
    return pictures, vision


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_are_those_of_the_processor_bit_for_bit(family: str, tmp_path: Path) -> None:
    pictures, vision = opened(family, tmp_path)
    theirs = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    # Mistral 3's processor makes sides multiples of what is merged.
    options = {"patch_size": 8} if family == "mistral3" else {}
    for kind in ("png", "jpeg", "alpha", "palette with transparency", "turned 6", "one pixel"):
        found = pictures.read(READABLE[kind], LIMIT)
        made = theirs(images=[load_image(Image.open(BytesIO(READABLE[kind])))], **options)["pixel_values"]
        wanted = np.asarray(made if family.startswith("qwen") else made[0], dtype="<f4")
        assert found.shape == wanted.shape and found.pixels == wanted.tobytes(), kind
        assert found.tokens == vision.tokens(found.grid)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_has_as_many_placeholders_as_the_tower_gives_features(family: str, tmp_path: Path) -> None:
    pictures, vision = opened(family, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    mark = MARKS.get(family, SPECIAL[family][0])
    for size in ((48, 24), (20, 30), (1, 1), (90, 64)):
        shown = pictures.read(saved(drawn(*size)), LIMIT)
        ids = tokenizer(pictures.expand(f"look {mark} there", [shown]))["input_ids"]
        pixels = mx.array(np.frombuffer(shown.pixels, "<f4").reshape(shown.shape))
        assert ids.count(vision.placeholder) == shown.tokens == len(vision.features(pixels, shown.grid).embeddings)


@pytest.mark.parametrize("family", ["gemma3", "idefics3", "llava"])
def test_a_conversation_has_the_ids_that_the_whole_processor_gives(family: str, tmp_path: Path) -> None:
    """For those that transformers makes without torchvision. The others need it for their videos."""
    pictures, _ = opened(family, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, extra_special_tokens=NAMES.get(family, {}))
    processor = PROCESSORS[family](AutoImageProcessor.from_pretrained(tmp_path, backend="pil"), tokenizer)
    mark = MARKS.get(family, SPECIAL[family][0])
    images = [drawn(48, 24), drawn(20, 30, seed=8)]
    text = f"one\n{mark} two\n\n{mark}\nthree"
    theirs = processor(text=text, images=[images], add_special_tokens=False)
    shown = [pictures.read(saved(image), LIMIT) for image in images]
    assert tokenizer(pictures.expand(text, shown), add_special_tokens=False)["input_ids"] == theirs["input_ids"][0]


SPELLING: dict[str, Any] = {
    "qwen2_vl": Qwen2VLProcessor,
    "qwen2_5_vl": Qwen2_5_VLProcessor,
    "qwen3_vl": Qwen3VLProcessor,
    "qwen3_vl_moe": Qwen3VLProcessor,
    "smolvlm": SmolVLMProcessor,
}
"""Processors that need torchvision for their videos, and not to say what a picture is in a text."""


@pytest.mark.parametrize("family", SPELLING)
def test_a_picture_is_spelled_as_its_processor_spells_it(family: str, tmp_path: Path) -> None:
    pictures, vision = opened(family, tmp_path)
    mark = SPECIAL[family][0]
    self: Any = SimpleNamespace(
        image_processor=pictures.processor,
        image_token=mark,
        fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
        image_seq_len=vision.tokens((0, 0)) if family == "smolvlm" else 0,
    )
    for size in ((48, 24), (20, 30), (90, 64), (1, 1)):
        made = pictures.processor(images=[drawn(*size)], return_tensors=None, **pictures.options)
        theirs = SPELLING[family].replace_image_token(self, made, 0)
        shown = pictures.read(saved(drawn(*size)), LIMIT)
        assert pictures.expand(f"see {mark}.", [shown]) == f"see {theirs}."


def test_a_digest_is_of_pixels_and_not_of_files(tmp_path: Path) -> None:
    pictures, _ = opened("qwen2_5_vl", tmp_path)
    image = drawn(24, 32)
    png, bmp, other = (
        pictures.read(data, LIMIT) for data in (saved(image), saved(image, "BMP"), saved(drawn(24, 32, seed=4)))
    )
    assert png == bmp and png.digest.startswith("sha256:")
    assert other.shape == png.shape and other.digest != png.digest
    turned = pictures.read(saved(image.transpose(Image.Transpose.ROTATE_90)), LIMIT)
    assert turned.grid != png.grid and turned.digest != png.digest


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "mistral3", "idefics3"])
def test_what_the_processor_does_not_take_is_half_a_sentence(family: str, tmp_path: Path) -> None:
    pictures, _ = opened(family, tmp_path)
    for data, reason in UNREADABLE.values():
        with pytest.raises(ValueError, match=reason):
            pictures.read(data, LIMIT)
    if family == "qwen2_5_vl":
        with pytest.raises(ValueError, match="processor does not take its 900 × 3 pixels"):
            pictures.read(saved(drawn(900, 3)), LIMIT)


def test_a_model_that_says_nothing_of_pictures_refuses_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = read_config(copied("qwen2_vl", tmp_path))
    vision, tokenizer = read_vision(tmp_path, config), AutoTokenizer.from_pretrained(tmp_path)
    assert vision is not None
    (tmp_path / "preprocessor_config.json").write_text("{")
    with caplog.at_level(logging.WARNING, "rollout_server.engine.model"):
        assert read_pictures(tmp_path, config, vision, tokenizer) is None
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "NoSuchProcessor"}))
        assert read_pictures(tmp_path, config, vision, tokenizer) is None
        (tmp_path / "preprocessor_config.json").unlink()
        assert read_pictures(tmp_path, config, vision, tokenizer) is None
    assert [record.message.count("refuse") for record in caplog.records] == [1, 1, 1]


@pytest.mark.parametrize("family", some_long(FAMILIES, "qwen3_vl", "pixtral"))
def test_a_picture_of_any_shape_has_as_many_features_as_placeholders_or_is_refused(family: str, tmp_path: Path) -> None:
    pictures, vision = opened(family, tmp_path)
    for width, height in ((1, 1), (2, 2), (3, 7), (5, 900), (1, 300), (300, 1), (100, 99)):
        try:
            picture = pictures.read(saved(drawn(width, height)), LIMIT)
        except ValueError as error:
            assert max(width, height) / min(width, height) > 100 and f"{width} × {height} pixels" in str(error)
            continue
        pixels = np.frombuffer(picture.pixels, "<f4").reshape(picture.shape)
        features = np.array(vision.features(mx.array(pixels), picture.grid).embeddings)
        assert len(features) == picture.tokens and np.isfinite(features).all()


@pytest.mark.parametrize("family", some_long(FAMILIES, "gemma3", "idefics3", "pixtral", "qwen3_vl"))
def test_a_head_says_how_many_placeholders_a_picture_will_have(family: str, tmp_path: Path) -> None:
    pictures, _ = opened(family, tmp_path)
    sizes = [(48, 24), (20, 30), (1, 1), (90, 64), (64, 91), (33, 300), (300, 33), (500, 420), (420, 500)]
    files = [saved(drawn(*size)) for size in sizes] + [READABLE["turned 6"], READABLE["turned 3"], READABLE["webp"]]
    for data in files:
        found, wanted = pictures.measure(data, LIMIT), pictures.read(data, LIMIT)
        assert found.tokens == wanted.tokens, Image.open(BytesIO(data)).size
    for data, _ in UNREADABLE.values():
        try:
            pictures.measure(data, LIMIT)
        except ValueError as error:
            assert "\n" not in str(error)
    with pytest.raises(ValueError, match="pixels"):
        pictures.measure(UNREADABLE["bomb"][0], LIMIT)
