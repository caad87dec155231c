"""LoRA and DoRA that PEFT trains on the language half of a vision model, with pictures, against torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adapters.errors import AdapterDoesNotFit
from adapters.formats.read import read_bundle
from tests.support.numbers.bounds import assert_near
from tests.support.peers import vision
from tests.support.pictures.seeing import opened


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", vision.VISIONS)
def test_adapters_on_the_language_half_are_those_of_peft(family: str, dora: bool, tmp_path: Path) -> None:
    with opened(family) as seeing:
        model = vision.adapted(seeing.path, dora=dora)
        model.save_pretrained(tmp_path)
        driver = seeing.start(prefill_tokens=7)
        config, weights = files_of(tmp_path)
        driver.push("p", read_bundle(weights, config, layers=driver.model.info.layers))
        for name, conversation in seeing.conversations.items():
            (found,) = driver.score([conversation.ids], [0], "p", pictures=(conversation.pictures,))
            _, pictures = vision.conversations(family)[name]
            expected = vision.read(model.base_model.model, family, conversation.ids, pictures)["logprobs"]
            # An adapted layer adds a product to that of the base, and so as many roundings again.
            assert_near(found.logprobs[1:], expected, 2 * conversation.within)
            assert abs(expected - conversation.logprobs).max() > 0.01


def test_what_peft_trains_on_the_tower_is_refused_by_name(tmp_path: Path) -> None:
    with opened("gemma3") as seeing:
        vision.adapted(seeing.path, ["q_proj"]).save_pretrained(tmp_path)
        config, weights = files_of(tmp_path)
        with pytest.raises(AdapterDoesNotFit, match="vision tower are not served"):
            read_bundle(weights, config, layers=seeing.model.info.layers)


def files_of(directory: Path) -> tuple[dict[str, object], bytes]:
    """Configuration and weights, as PEFT saves them."""
    config = json.loads((directory / "adapter_config.json").read_text())
    return config, (directory / "adapter_model.safetensors").read_bytes()
