"""Every encoder against transformers in float32, with checkpoints exactly as transformers writes them: alone, together,
with LoRA and DoRA on every linear layer, and the buckets of DeBERTa's distances."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

from adapters.bundle import AdapterBundle
from adapters.formats import peft
from adapters.formats.read import read_bundle
from adapters.resident.slots import AdapterSlots
from rollout_server.engine.messages.options import EngineOptions, ModelInfo, Task
from rollout_server.engine.model.encoders.encoder import EncoderModel
from rollout_server.engine.model.encoders.load import read_encoder
from rollout_server.engine.model.encoders.passages import Passage
from rollout_server.engine.model.encoders.pooling import Pooling
from rollout_server.engine.model.encoders.reading import forward, read, results
from rollout_server.engine.model.encoders.resident import load_encoder
from rollout_server.models.encoders.deberta_v2 import log_bucket
from tests.peers.conftest import TOLERANCE, Hold
from tests.support.engine.encoder_driver import Driven, classify, numbers
from tests.support.peers import encoders

LENGTHS = (1, 2, 7, 33, 40, 64, 97, 128)
TASKS: tuple[Task, ...] = ("classify", "token_classify", "embed")


def opened(directory: Path) -> EncoderModel:
    return replace(read_encoder(directory), pooling=Pooling(("mean",), normalise=False))


def wanted(model: torch.nn.Module, task: Task, given: list[Passage]) -> list[np.ndarray]:
    values = encoders.computed(model, task, given)
    return [each.mean(axis=0) for each in values] if task == "embed" else values


def furthest(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", list(encoders.ENCODERS))
def test_numbers_are_those_of_transformers(name: str, task: Task, tmp_path: Path, hold: Hold) -> None:
    model = opened(encoders.build(name, task, tmp_path))
    given = encoders.passages(LENGTHS, types=model.limits.token_types, pad=model.pad_id)
    theirs = wanted(encoders.load(tmp_path, task), task, given)
    hold(read(model, given, 4096), theirs, name, f"{task}, together")
    hold([read(model, [passage], 1)[0] for passage in given], theirs, name, f"{task}, alone")


@pytest.mark.parametrize("name", ["bert", "modernbert", "deberta-v3"])
def test_weights_saved_as_bf16_are_read_as_they_are(name: str, tmp_path: Path, hold: Hold) -> None:
    encoders.build(name, "classify", tmp_path, grid=torch.bfloat16, saved=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    model = opened(tmp_path)
    given = encoders.passages(LENGTHS, types=model.limits.token_types)
    theirs = wanted(encoders.load(tmp_path, "classify"), "classify", given)
    hold(read(model, given, 512), theirs, name, "classify, bfloat16")


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "modernbert", "deberta-v2", "deberta-v3"])
def test_adapters_give_what_they_give_in_peft(name: str, kind: encoders.Kind, tmp_path: Path, hold: Hold) -> None:
    """Pushed as PEFT saved them; rows of two versions and of the base share a forward."""
    model = opened(encoders.build(name, "classify", tmp_path / "base"))
    slots = AdapterSlots(model.module, model.layers, mx.float32)
    peers, staged = [encoders.load(tmp_path / "base", "classify")], [0]
    for seed in (1, 2):
        peers.append(encoders.adapted(tmp_path / "base", "classify", kind, seed))
        peers[-1].save_pretrained(tmp_path / str(seed))
        config = json.loads((tmp_path / str(seed) / "adapter_config.json").read_text())
        content = (tmp_path / str(seed) / "adapter_model.safetensors").read_bytes()
        staged.append(slots.stage(read_bundle(content, config, layers=model.layers)))
    given = encoders.passages((40, 33, 37, 40, 36), types=model.limits.token_types)
    which = [0, 1, 2, 1, 0]
    theirs = [wanted(peers[at], "classify", [passage])[0] for at, passage in zip(which, given, strict=True)]
    base = [wanted(peers[0], "classify", [passage])[0] for passage in given]
    slots.route([staged[at] for at in which])
    mixed = results(model, forward(model, given, mixed=True), given)
    hold(mixed, theirs, name, f"{kind}, mixed")
    assert furthest(theirs, base) > TOLERANCE
    slots.route([staged[1]] * len(given))
    hold(read(model, given, 4096), wanted(peers[1], "classify", given), name, kind)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "modernbert", "deberta-v2", "deberta-v3"])
def test_a_classifier_that_peft_trained_comes_with_its_adapter(name: str, tmp_path: Path, hold: Hold) -> None:
    """Saved for SEQ_CLS, pushed and asked beside the base, which goes on with its own."""
    base = encoders.build(name, "classify", tmp_path / "base")
    peer = encoders.adapted(base, "classify", "lora", 1, ["query", "q_lin", "Wqkv", "query_proj"], task_type="SEQ_CLS")
    peer.save_pretrained(tmp_path / "adapter")
    driven = Driven(load_encoder(EngineOptions(str(base), "tiny")))
    info = driven.encoder.info
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    content = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    bundle = read_bundle(content, config, layers=info.layers, parameters=info.weights, scoring=info.scoring)
    driven.push("rm", bundle)
    given = encoders.passages((40, 33, 7))
    sequences = [passage.ids for passage in given]
    own, before = driven.ask(classify("own", sequences, "rm"), classify("base", sequences))
    for event, model in ((own, peer), (before, encoders.load(base, "classify"))):
        hold([rows[0] for rows in numbers(event, 3)], wanted(model, "classify", given), name, "SEQ_CLS and the base")
    assert furthest(numbers(own, 3), numbers(before, 3)) > 0.01


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "modernbert", "deberta-v3"])
@pytest.mark.parametrize(
    ("task", "of_peft", "exported"),
    [
        ("classify", "SEQ_CLS", "SEQ_CLS"),
        ("classify", None, None),
        ("token_classify", "TOKEN_CLS", "TOKEN_CLS"),
        ("embed", None, "FEATURE_EXTRACTION"),
    ],
)
def test_peft_loads_what_is_exported(
    name: str, task: Task, of_peft: str | None, exported: str | None, tmp_path: Path
) -> None:
    """On the class that it was trained on, with the same numbers; and the server reads it back as the same version."""
    base = encoders.build(name, task, tmp_path / "base")
    targets = ["query", "q_lin", "Wqkv", "query_proj"]
    peer = encoders.adapted(base, task, "lora", 1, targets, **({"task_type": of_peft} if of_peft else {}))
    bundle = as_saved(peer, base, tmp_path / "trained")
    assert write_back(bundle, base, tmp_path / "exported")["task_type"] == exported
    again = PeftModel.from_pretrained(encoders.load(base, task), tmp_path / "exported").eval()
    given = encoders.passages((40, 33, 7))
    theirs = wanted(peer, task, given)
    assert furthest(wanted(again, task, given), theirs) == 0.0
    assert furthest(theirs, wanted(encoders.load(base, task), task, given)) > 0.01


@pytest.mark.parametrize(
    ("name", "layer"), [("bert", "classifier"), ("roberta", "out_proj"), ("distilbert", "pre_classifier")]
)
def test_an_adapter_on_the_head_is_exported_for_no_task(name: str, layer: str, tmp_path: Path) -> None:
    base = encoders.build(name, "classify", tmp_path / "base")
    peer = encoders.adapted(base, "classify", "lora", 1, ["query", "q_lin", layer])
    assert write_back(as_saved(peer, base, tmp_path / "trained"), base, tmp_path / "exported")["task_type"] is None
    again = PeftModel.from_pretrained(encoders.load(base, "classify"), tmp_path / "exported").eval()
    given = encoders.passages((40, 33, 7))
    assert furthest(wanted(again, "classify", given), wanted(peer, "classify", given)) == 0.0


def as_saved(peer: PeftModel, base: Path, place: Path) -> AdapterBundle:
    """What the server of `base` makes of the file that PEFT writes."""
    peer.save_pretrained(place)
    content = (place / "adapter_model.safetensors").read_bytes()
    return bundle_of(content, json.loads((place / "adapter_config.json").read_text()), base)


def write_back(bundle: AdapterBundle, base: Path, place: Path) -> dict[str, Any]:
    """Exports a version into a directory; its configuration."""
    info = info_of(base)
    content, config = peft.write(bundle, info.scoring, info.weights)
    assert bundle_of(content, config, base).digest == bundle.digest
    place.mkdir()
    (place / "adapter_model.safetensors").write_bytes(content)
    (place / "adapter_config.json").write_text(json.dumps(config))
    return config


def bundle_of(content: bytes, config: dict[str, Any], base: Path) -> AdapterBundle:
    info = info_of(base)
    return read_bundle(content, config, layers=info.layers, parameters=info.weights, scoring=info.scoring)


def info_of(base: Path) -> ModelInfo:
    return load_encoder(EngineOptions(str(base), "tiny")).info


def test_distances_fall_into_the_buckets_of_transformers() -> None:
    distances = np.arange(-2048, 2049)
    for buckets in (8, 16, 32, 64, 256, 512):
        for largest in (buckets // 2 + 2, 33, 140, 512, 1024, 4097):
            if (largest - 1) / (buckets // 2) > 1:
                theirs = make_log_bucket_position(torch.tensor(distances), buckets, largest).long().numpy()
                ours = log_bucket(distances, buckets, largest)
                # Either's model takes all beyond the last bucket for the last; how far beyond is torch's rounding.
                last = [np.clip(found, -buckets, buckets - 1) for found in (ours, theirs)]
                np.testing.assert_array_equal(*last, f"{buckets}, {largest}")
