"""What a directory is served as, and what is refused at the start, by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rollout_server.engine.messages.options import EngineOptions, ModelInfo
from rollout_server.engine.model.load import load
from rollout_server.errors import EngineUnavailable
from tests.support import tiny_models, tiny_scorers
from tests.support.tiny_scorers import HIDDEN


def info(directory: Path) -> ModelInfo:
    return load(EngineOptions(str(directory), "rm")).info


def change(directory: Path, **fields: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | fields))


def test_a_decoder_generates(tmp_path: Path) -> None:
    found = info(tiny_models.build("llama", tmp_path))
    assert (found.task, found.labels, found.activation) == ("generate", (), "none")


@pytest.mark.parametrize(
    ("what", "labels", "task", "activation"),
    [
        ("SequenceClassification", 1, "classify", "sigmoid"),
        ("SequenceClassification", 2, "classify", "softmax"),
        ("TokenClassification", 3, "token_classify", "softmax"),
    ],
)
def test_a_head_says_how_many_labels_there_are(
    what: str, labels: int, task: str, activation: str, tmp_path: Path
) -> None:
    found = info(tiny_scorers.build("llama", tmp_path, what=what, labels=labels))
    assert (found.task, found.activation) == (task, activation)
    assert found.labels == (None,) * labels
    assert found.vocab_size == tiny_models.VOCAB_SIZE
    assert not any("score" in path or "lm_head" in path for path in found.layers)


def test_labels_have_the_names_that_config_json_gives_them(tmp_path: Path) -> None:
    named = {"0": "bad", "1": "LABEL_1", "2": "good"}
    assert info(tiny_scorers.build("qwen3", tmp_path, labels=3, id2label=named)).labels == ("bad", None, "good")


@pytest.mark.parametrize(
    ("fields", "activation"),
    [
        ({"problem_type": "regression"}, "none"),
        ({"problem_type": "multi_label_classification"}, "sigmoid"),
        ({"problem_type": "single_label_classification"}, "softmax"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, "none"),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.activation.Sigmoid"}, "sigmoid"),
        ({"sentence_transformers": {"version": "5.0"}, "problem_type": "regression"}, "none"),
    ],
)
def test_the_activation_is_what_vllm_takes(fields: dict[str, Any], activation: str, tmp_path: Path) -> None:
    assert info(tiny_scorers.build("llama", tmp_path, labels=2, **fields)).activation == activation


@pytest.mark.parametrize(
    ("architecture", "task", "labels"),
    [("Qwen2ForRewardModel", "classify", 1), ("Qwen2ForProcessRewardModel", "token_classify", 2)],
)
def test_heads_of_two_layers_are_qwens(architecture: str, task: str, labels: int, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    shapes = {"score.0.weight": (HIDDEN, HIDDEN), "score.0.bias": (HIDDEN,)}
    shapes |= {"score.2.weight": (labels, HIDDEN), "score.2.bias": (labels,)}
    head = {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    own = {"architectures": [architecture], "auto_map": {"AutoModel": "modeling_qwen2_rm.Qwen2ForRewardModel"}}
    found = load(EngineOptions(str(tiny_scorers.build("qwen2", tmp_path, head=head, **own)), "rm"))
    assert (found.info.task, len(found.info.labels)) == (task, labels)
    assert found.head is not None
    assert len(found.head.layers) == 2


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "QWenLMHeadModel", "LlamaForCausalLM", None])
def test_decoders_whose_names_lack_for_generate(architecture: str | None, tmp_path: Path) -> None:
    tiny_models.build("llama", tmp_path)
    change(tmp_path, architectures=architecture and [architecture])
    assert info(tmp_path).task == "generate"


@pytest.mark.parametrize(
    "architecture",
    [
        "LlamaForRewardModelWithGating",
        "LlamaForQuestionAnswering",
        "InternLM2ForRewardModel",
        "LlamaRewardModel",
        "InternLM2RewardModel",
        "MistralPRM",
        "MistralModel",
        "GPT2DoubleHeadsModel",
    ],
)
def test_an_architecture_that_is_not_known_is_refused_by_name(architecture: str, tmp_path: Path) -> None:
    tiny_scorers.build("llama", tmp_path, architectures=[architecture])
    with pytest.raises(EngineUnavailable, match=f"'{architecture}'"):
        info(tmp_path)


def test_a_classifier_without_a_head_is_refused(tmp_path: Path) -> None:
    tiny_models.build("llama", tmp_path)
    change(tmp_path, architectures=["LlamaForSequenceClassification"])
    with pytest.raises(EngineUnavailable, match=r"LlamaForSequenceClassification, but has no score.weight"):
        info(tmp_path)


def test_a_decoder_with_a_head_is_not_served_without_it(tmp_path: Path) -> None:
    tiny_models.build("llama", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, **tiny_scorers.random_head(1)}, tmp_path / "model.safetensors")
    with pytest.raises(EngineUnavailable, match="score"):
        info(tmp_path)


@pytest.mark.parametrize(
    ("head", "says"),
    [
        ({"score.weight": np.zeros((1, HIDDEN + 1), np.float32)}, f"reads {HIDDEN + 1} values"),
        ({"score.weight": np.zeros((HIDDEN,), np.float32)}, "none that a"),
        ({"score.weight": np.zeros((1, HIDDEN), np.float32), "score.bias": np.zeros(2, np.float32)}, "none that a"),
        ({"score.dense.weight": np.zeros((1, HIDDEN), np.float32)}, "none that a"),
        ({"score.0.weight": np.zeros((1, HIDDEN), np.float32)}, "none that a"),
    ],
)
def test_a_head_of_another_shape_is_refused(head: dict[str, np.ndarray], says: str, tmp_path: Path) -> None:
    tiny_scorers.build("llama", tmp_path, head=head)
    with pytest.raises(EngineUnavailable, match=says):
        info(tmp_path)


def test_labels_that_disagree_with_the_head_are_refused(tmp_path: Path) -> None:
    tiny_scorers.build("llama", tmp_path, labels=2, id2label={"0": "a", "1": "b", "2": "c"})
    with pytest.raises(EngineUnavailable, match="3 labels in id2label"):
        info(tmp_path)


def test_a_number_of_labels_that_disagrees_with_the_head_is_refused(tmp_path: Path) -> None:
    tiny_scorers.build("llama", tmp_path, labels=2, num_labels=5)
    with pytest.raises(EngineUnavailable, match="5 labels in num_labels"):
        info(tmp_path)
    change(tmp_path, num_labels=2)
    assert len(info(tmp_path).labels) == 2


def test_an_activation_that_is_not_known_is_refused(tmp_path: Path) -> None:
    tiny_scorers.build("llama", tmp_path, sbert_ce_default_activation_function="torch.nn.Hardtanh")
    with pytest.raises(EngineUnavailable, match="Hardtanh"):
        info(tmp_path)
