"""Our towers, and mlx-lm's decoders behind them, against what torch computed with the checkpoints beside this file,
which `make_golden.py` wrote."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from rollout_server.engine.model.checkpoint.files import read_config
from rollout_server.engine.model.load import read_model
from rollout_server.engine.model.vision.load import read_vision
from rollout_server.models.vision.family import Features, VisionFamily
from tests.laws.grids import corners
from tests.support.golden_vision import CONVERSATIONS, FAMILIES, GOLDEN, Reference, copied, whole_logits
from tests.support.numbers.bounds import Network, assert_near
from tests.support.tiny_models import VOCAB_SIZE

NETWORK = Network(6, 128, VOCAB_SIZE)
"""Three layers of a tower and three of a decoder, at most; the widest product merges four patches."""
LIMIT = 1e-4


def opened(family: str, directory: Path) -> VisionFamily:
    path = copied(family, directory)
    found = read_vision(path, read_config(path))
    assert found is not None
    return found


def seen(vision: VisionFamily, reference: Reference) -> list[Features]:
    return [vision.features(mx.array(reference.pixels(at)), reference.grid(at)) for at in (0, 1)]


def test_every_family_has_a_checkpoint() -> None:
    assert set(FAMILIES) == {
        "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "gemma3", "llava", "pixtral", "mistral3", "idefics3",
        "smolvlm",
    }  # fmt: skip
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*.safetensors")) <= 2_500_000


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    vision, reference = opened(family, tmp_path), Reference.of(family)
    for number, found in enumerate(seen(vision, reference)):
        wanted = reference.arrays[f"features.{number}"]
        ours = np.array(found.embeddings)
        if family == "gemma3":
            ours = ours * np.array(mx.array(wanted.shape[-1] ** 0.5, mx.bfloat16).astype(mx.float32))
        assert ours.shape == wanted.shape == (vision.tokens(reference.grid(number)), wanted.shape[-1])
        deep = sorted(name for name in reference.arrays if name.startswith(f"deepstack.{number}."))
        assert len(found.deepstack) == len(deep)
        pairs = [
            (ours, wanted),
            *((np.array(a), reference.arrays[b]) for a, b in zip(found.deepstack, deep, strict=True)),
        ]
        for mine, theirs in pairs:
            assert_near(mine, theirs, NETWORK.of_logits(theirs, 64), family)
            assert np.abs(mine - theirs).max() <= LIMIT


@pytest.mark.parametrize(("family", "conversation"), corners(FAMILIES, CONVERSATIONS))
def test_a_whole_conversation_is_read_as_transformers_reads_it(family: str, conversation: str, tmp_path: Path) -> None:
    vision, reference = opened(family, tmp_path), Reference.of(family)
    module = read_model(tmp_path).module
    module.update(tree_map(lambda array: array.astype(mx.float32), module.parameters()))
    features, pictures = seen(vision, reference), reference.pictures(conversation)
    ids, grids = reference.ids(conversation), [reference.grid(at) for at in pictures]
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    theta = text["rope_parameters"].get("rope_theta", 0.0)
    logits = whole_logits(module, vision, ids, [features[at] for at in pictures], grids, theta)
    wanted = reference.arrays[f"{conversation}.logits"]
    bound = NETWORK.of_logits(logits, len(ids))
    assert_near(logits[-1], wanted, bound, family)
    chosen = log_softmax(logits[:-1])[np.arange(len(ids) - 1), ids[1:]]
    assert_near(chosen, reference.arrays[f"{conversation}.logprobs"], 2 * bound, family)
    assert np.abs(logits[-1] - wanted).max() <= LIMIT
    if (positions := vision.positions(ids, grids)) is not None:
        assert positions.dtype == np.int32
        assert (positions == reference.arrays[f"{conversation}.positions"]).all()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    return (
        wide - np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1, keepdims=True)) - wide.max(-1, keepdims=True)
    )
