"""Our engine against log-probabilities that torch and PEFT computed: the files that `make_golden.py` wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save, save_file

from adapters.formats.read import read_bundle
from tests.laws.grids import some_long
from tests.support.engine.driver import Driver
from tests.support.numbers.bounds import GOLDEN, assert_near
from tests.support.tiny_models import write_tokenizer

HERE = Path(__file__).parent
FAMILIES = sorted(path.parent.name for path in HERE.glob("*/reference.safetensors"))
SCORED = sorted(path.parent.name for path in HERE.glob("*/heads.safetensors"))
COMMON = ("llama", "gemma3_text", "gpt_oss", "qwen3_moe")
"""Those that `make test` compares: plain, with windows, with sinks, with experts."""
OTHERS = ("model", "reference", "heads", "reward")
"""What is no adapter that samples."""
Start = Callable[[str], Driver]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    def started(family: str) -> Driver:
        weights = load_file(HERE / family / "model.safetensors")
        save_file({name: value.astype(np.float32) for name, value in weights.items()}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text((HERE / family / "config.json").read_text())
        write_tokenizer(tmp_path)
        return Driver.start(tmp_path)

    return started


def kinds(family: str) -> list[str]:
    return sorted(path.stem for path in (HERE / family).glob("*.safetensors") if path.stem not in OTHERS)


def config_of(family: str, kind: str) -> dict[str, Any]:
    with safe_open(HERE / family / f"{kind}.safetensors", "numpy") as file:
        return json.loads(file.metadata()["adapter_config"])


def push(driver: Driver, family: str, kind: str, **changed: Any) -> None:
    path = HERE / family / f"{kind}.safetensors"
    # The file's own configuration speaks for it; another one needs the tensors without it.
    content, config = (
        (save(load_file(path)), config_of(family, kind) | changed) if changed else (path.read_bytes(), None)
    )
    driver.push(kind, read_bundle(content, config, layers=driver.model.info.layers))


def difference(driver: Driver, family: str, policy: str) -> float:
    """The largest, in units of what rounding may do."""
    reference = load_file(HERE / family / "reference.safetensors")
    prompts = np.split(reference["prompts"], np.cumsum(reference["lengths"])[:-1])
    scored = driver.score([prompt.tolist() for prompt in prompts], policy=policy)
    ours = np.concatenate([np.array(sequence.logprobs[1:], np.float64) for sequence in scored])
    assert ours.shape == reference[policy].shape
    return float(np.abs(ours - reference[policy]).max()) / GOLDEN.of_logprobs(ours, reference["lengths"].max())


def test_there_are_enough_of_them() -> None:
    assert len(FAMILIES) >= 8
    assert len(SCORED) >= 10
    assert all({"lora", "rslora", "dora"} <= set(kinds(family)) for family in FAMILIES)
    files = (path for path in HERE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert sum(path.stat().st_size for path in files) <= 5_000_000


@pytest.mark.parametrize("family", some_long(FAMILIES, *COMMON))
def test_embeddings_are_those_of_transformers(family: str, start: Start) -> None:
    driver = start(family)
    reference = load_file(HERE / family / "reference.safetensors")
    prompts = [p.tolist() for p in np.split(reference["prompts"], np.cumsum(reference["lengths"])[:-1])]
    push(driver, family, "lora")
    push(driver, family, "dora")
    for how in ("last", "mean"):
        driver.set_pooling(how)
        for policy in ("base", "lora", "dora"):
            found, expected = driver.embed(prompts, policy), reference[f"{policy}, {how}"]
            assert_near(found, expected, GOLDEN.of_logits(expected, reference["lengths"].max()), f"{policy}, {how}")


@pytest.mark.parametrize("family", some_long(FAMILIES, *COMMON))
def test_log_probabilities_are_those_of_peft(family: str, start: Start) -> None:
    driver = start(family)
    assert difference(driver, family, "base") <= 1
    for kind in kinds(family):
        push(driver, family, kind)
        assert difference(driver, family, kind) <= 1, kind
    assert difference(driver, family, "base") <= 1


@pytest.mark.parametrize("family", some_long(SCORED, *COMMON))
def test_label_scores_are_those_of_peft_and_of_transformers(family: str, start: Start, tmp_path: Path) -> None:
    """A reward adapter on the bare base, and the base with that head as a model of its own."""
    expected, reference = (
        load_file(HERE / family / "heads.safetensors"),
        load_file(HERE / family / "reference.safetensors"),
    )
    prompts = [p.tolist() for p in np.split(reference["prompts"], np.cumsum(reference["lengths"])[:-1])]
    longest = reference["lengths"].max()
    driver = start(family)
    info = driver.model.info
    content = (HERE / family / "reward.safetensors").read_bytes()
    bundle = read_bundle(content, None, layers=info.layers, parameters=info.weights, scoring=info.scoring)
    driver.push("reward", bundle)
    found = np.concatenate(driver.classify(prompts, "reward", positions=[(len(own) - 1,) for own in prompts]))
    assert_near(found, expected["reward"], GOLDEN.of_logits(expected["reward"], longest), "reward")
    head = {name: bundle.tensors[name].float32() for name in bundle.spec.head}
    weights = {n: v for n, v in load_file(tmp_path / "model.safetensors").items() if not n.startswith("lm_head")}
    save_file({**weights, **head}, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = [config["architectures"][0].replace("ForCausalLM", "ForSequenceClassification")]
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = np.concatenate(Driver.start(tmp_path).classify(prompts, positions=[(len(own) - 1,) for own in prompts]))
    assert_near(found, expected["bare"], GOLDEN.of_logits(expected["bare"], longest), "bare")


def test_a_scale_that_is_off_by_a_hundredth_is_seen(start: Start) -> None:
    driver = start("llama")
    for kind in ("lora", "rslora", "dora"):
        push(driver, "llama", kind, lora_alpha=config_of("llama", kind)["lora_alpha"] * 1.01)
        assert difference(driver, "llama", kind) > 5, kind
