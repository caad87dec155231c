"""Pixtral's and Mistral 3's placeholders as their processor writes them, which needs torchvision to be imported."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.models.pixtral.processing_pixtral import PixtralProcessor

from rollout_server.engine.model.checkpoint.files import read_config
from rollout_server.engine.model.vision.load import read_vision
from rollout_server.engine.model.vision.reader import read_pictures
from tests.support.golden_vision import SPECIAL, copied
from tests.support.pictures.files import drawn, saved


@pytest.mark.parametrize("family", ["pixtral", "mistral3"])
def test_a_picture_is_spelled_as_its_processor_spells_it(family: str, tmp_path: Path) -> None:
    config = read_config(copied(family, tmp_path))
    vision = read_vision(tmp_path, config)
    assert vision is not None
    pictures = read_pictures(tmp_path, config, vision, AutoTokenizer.from_pretrained(tmp_path))
    assert pictures is not None
    image, line, end = SPECIAL[family][:3]
    patch = config["vision_config"]["patch_size"]
    self: Any = SimpleNamespace(
        patch_size=patch,
        spatial_merge_size=config.get("spatial_merge_size", 1),
        image_token=image,
        image_break_token=line,
        image_end_token=end,
    )
    for size in ((48, 24), (20, 30), (90, 64), (1, 1), (33, 300)):
        made = pictures.processor(images=[drawn(*size)], return_tensors=None, **pictures.options)
        theirs = PixtralProcessor.replace_image_token(self, made, 0)
        shown = pictures.read(saved(drawn(*size)), 1_000_000)
        assert pictures.expand(f"see {image}.", [shown]) == f"see {theirs}."
