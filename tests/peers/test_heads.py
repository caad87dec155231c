"""Classifiers, reward models and process reward models against transformers and PEFT in float32, from the files that
they write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

from rollout_server.engine.messages.scoring import Classified
from tests.peers.conftest import Hold
from tests.support import tiny_scorers
from tests.support.engine.driver import Driver, prompts_of
from tests.support.peers import families, reference

DENSE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "starcoder2", "glm")
EXPERTS = ("qwen3_moe", "mixtral", "gpt_oss")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ROWS = prompts_of([37, 16, 2, 1, 90], 280)
PROMPT, *TAILS = prompts_of([100, 5, 9, 1], 280)
GROUP = [PROMPT + tail for tail in TAILS]

pytestmark = pytest.mark.filterwarnings("ignore")


def scores(model: torch.nn.Module, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Logits of each row, read alone."""
    with torch.no_grad():
        return [model(input_ids=torch.tensor([list(row)])).logits[0].float().numpy() for row in rows]


def hold_all(hold: Hold, driver: Driver, model: torch.nn.Module, family: str, policy: str = "base") -> None:
    """Alone, together, and as samples of one prompt."""
    rows = [*ROWS, *GROUP]
    expected = scores(model, rows)
    hold([own[0] for own in driver.classify(rows, policy)], expected, family, f"{policy}, together")
    alone = [driver.classify([row], policy)[0][0] for row in ROWS]
    hold(alone, expected[: len(ROWS)], family, f"{policy}, alone")


def push(driver: Driver, model: torch.nn.Module, place: Path, name: str) -> None:
    """What PEFT saves of a model, as a version."""
    model.save_pretrained(place)
    tensors = {key: value.numpy() for key, value in load_file(place / "adapter_model.safetensors").items()}
    config = json.loads((place / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier", "score"]
    driver.push(name, tiny_scorers.bundle(driver.model.info, tensors, config))


@pytest.mark.parametrize("family", DENSE + EXPERTS)
def test_reward_models_and_adapters_on_them(family: str, tmp_path: Path, hold: Hold) -> None:
    auto = AutoModelForSequenceClassification
    directory = families.build(family, tmp_path / "model", auto=auto, num_labels=3)
    driver = Driver.start(directory, prefill_tokens=24)  # Rows are read in several chunks.
    hold_all(hold, driver, families.load(directory, auto), family)
    for kind in ("lora", "dora"):
        options: dict[str, Any] = {**reference.KINDS[kind], "task_type": "SEQ_CLS"}
        options |= {"target_modules": ATTENTION} if family in EXPERTS else {}
        model = reference.adapted(directory, auto=auto, **options)
        push(driver, model, tmp_path / kind, kind)
        hold_all(hold, driver, model, family, kind)


def test_a_family_that_has_its_output_within_its_body(tmp_path: Path, hold: Hold) -> None:
    auto = AutoModelForSequenceClassification
    rope = {"rope_type": "default", "rope_theta": 20000.0, "partial_rotary_factor": 0.5}
    sizes = {"hidden_size": 48, "intermediate_size": 192, "rope_parameters": rope}
    directory = families.build("gpt_neox", tmp_path, auto=auto, num_labels=1, **sizes)
    hold_all(hold, Driver.start(directory, prefill_tokens=24), families.load(directory, auto), "gpt_neox")


def test_adapters_on_a_classifier_keep_its_labels(tmp_path: Path) -> None:
    """PEFT saves a head with every adapter for SEQ_CLS, and no word on its labels."""
    auto, named = AutoModelForSequenceClassification, {"id2label": {0: "bad", 1: "good"}, "problem_type": "regression"}
    directory = families.build("llama", tmp_path / "model", auto=auto, **named)
    driver = Driver.start(directory)
    push(driver, reference.adapted(directory, auto=auto, r=4, task_type="SEQ_CLS"), tmp_path / "lora", "lora")
    for policy in ("base", "lora"):
        driver.classify(ROWS, policy)
    told = {(event.labels, event.activation) for event in driver.events if isinstance(event, Classified)}
    assert told == {(("bad", "good"), "none")}


@pytest.mark.parametrize("family", DENSE + EXPERTS)
def test_reward_adapters_on_a_base_that_generates(family: str, tmp_path: Path, hold: Hold) -> None:
    """Two reward versions and one for tokens, mixed with each other."""
    directory = families.build(family, tmp_path / "model")
    driver = Driver.start(directory, prefill_tokens=64)
    found: dict[str, torch.nn.Module] = {}
    for kind, labels, dora in (("one", 1, False), ("two", 2, True)):
        options: dict[str, Any] = {"r": 4, "lora_alpha": 7, "use_dora": dora, "task_type": "SEQ_CLS"}
        options |= {"target_modules": ATTENTION} if family in EXPERTS else {}
        model = reference.adapted(
            directory, seed=labels, auto=AutoModelForSequenceClassification, num_labels=labels, **options
        )
        push(driver, model, tmp_path / kind, kind)
        found[kind] = model
    asked = {kind: driver.ask_classify(ROWS, kind) for kind in found}
    for kind, model in found.items():
        together = [own[0] for own in driver.classified(asked[kind])]
        hold(together, scores(model, ROWS), family, f"{kind}, mixed")
        hold_all(hold, driver, model, family, kind)


@pytest.mark.parametrize("family", ("llama", "qwen2", "qwen3", "phi3", "mixtral", "gpt_oss"))
def test_tokens_are_scored_as_by_transformers(family: str, tmp_path: Path, hold: Hold) -> None:
    auto = AutoModelForTokenClassification
    directory = families.build(family, tmp_path / "model", auto=auto, num_labels=2)
    driver = Driver.start(directory, prefill_tokens=24)
    every = [range(len(row)) for row in ROWS]
    hold(driver.classify(ROWS, positions=every), scores(families.load(directory, auto), ROWS), family, "tokens")
    bare = families.build(family, tmp_path / "bare")
    driver = Driver.start(bare)
    targets = ["qkv_proj"] if family == "phi3" else ATTENTION
    options: dict[str, Any] = {"r": 3, "lora_alpha": 5, "task_type": "TOKEN_CLS", "target_modules": targets}
    model = reference.adapted(bare, auto=auto, num_labels=2, **options)
    push(driver, model, tmp_path / "prm", "prm")
    hold(driver.classify(ROWS, "prm", positions=every), scores(model, ROWS), family, "tokens, adapter")


@pytest.mark.parametrize("pad", ["own", "end", "none"])
@pytest.mark.parametrize("family", ("llama", "qwen3"))
def test_pads_are_passed_over_as_by_transformers(family: str, pad: str, tmp_path: Path, hold: Hold) -> None:
    special = families.write_tokenizer(tmp_path)
    token = {"own": special["<|pad|>"], "end": special["<|end|>"], "none": None}[pad]
    auto = AutoModelForSequenceClassification
    directory = families.build(family, tmp_path / "model", auto=auto, num_labels=1, pad_token_id=token)
    filler = special["<|end|>"] if token is None else token
    rows = [[*ROWS[1], filler], [*ROWS[1], filler, filler], [filler] * 3, [filler, *ROWS[1]], ROWS[1]]
    model = families.load(directory, auto)
    assert model.config.pad_token_id == token
    found = [own[0] for own in Driver.start(directory).classify(rows)]
    hold(found, scores(model, rows), family, f"pad: {pad}")


@pytest.mark.parametrize("family", ("llama", "gemma2"))
def test_weights_in_bfloat16_are_read_as_float32(family: str, tmp_path: Path, hold: Hold) -> None:
    auto = AutoModelForSequenceClassification
    directory = families.build(family, tmp_path, auto=auto, num_labels=2, grid=torch.bfloat16, dtype=torch.bfloat16)
    hold_all(hold, Driver.start(directory), families.load(directory, auto), f"{family}, bfloat16")


@pytest.mark.parametrize(("architecture", "labels"), [("Qwen2ForRewardModel", 1), ("Qwen2ForProcessRewardModel", 2)])
def test_heads_of_qwens_reward_models(architecture: str, labels: int, tmp_path: Path, hold: Hold) -> None:
    """Their code is in their repositories; what it computes behind the hidden states is stated again here."""
    families.build("qwen2", tmp_path)
    trunk = AutoModel.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    width = trunk.config.hidden_size
    torch.manual_seed(0)
    head = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, labels))
    weights = load_file(tmp_path / "model.safetensors")
    own = {f"score.{name}": value.detach() for name, value in head.named_parameters()}
    save_file({**weights, **own}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"architectures": [architecture], "auto_map": {"AutoModel": f"modeling_qwen2_rm.{architecture}"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        expected = [head(trunk(input_ids=torch.tensor([row])).last_hidden_state[0]).numpy() for row in ROWS]
    driver = Driver.start(tmp_path, prefill_tokens=32)
    hold(driver.classify(ROWS, positions=[range(len(row)) for row in ROWS]), expected, architecture, "tokens")
