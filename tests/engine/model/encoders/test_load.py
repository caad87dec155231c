"""An encoder's directory: what it is taken for, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file, save_file

from rollout_server.engine.model.encoders.architecture import is_encoder
from rollout_server.engine.model.encoders.load import read_encoder
from rollout_server.engine.model.encoders.pooling import Pooling
from rollout_server.engine.model.encoders.reading import read
from rollout_server.errors import EngineUnavailable
from tests.support.golden_encoders import CHECKPOINTS, copied, opened, passages
from tests.support.numbers.bounds import Network, assert_near

MODULES = [
    {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]
NETWORK = Network(3, 24, 3)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_it_is_what_its_architecture_says(checkpoint: str, tmp_path: Path) -> None:
    model = opened(checkpoint, tmp_path)
    assert model.task == checkpoint.rpartition("/")[2]
    assert model.labels == (() if model.task == "embed" else (None,) * 3)
    assert model.dtype == mx.float32
    assert (model.width, model.limits.vocabulary) == (16, 320)
    assert not tree_flatten(model.module.trainable_parameters())


def test_adaptable_layers_have_the_names_of_the_checkpoint(tmp_path: Path) -> None:
    for checkpoint in CHECKPOINTS:
        directory = copied(checkpoint, tmp_path / checkpoint)
        names = load_file(directory / "model.safetensors")
        layers = read_encoder(directory).layers
        assert layers and {f"{path}.weight" for path in layers} <= names.keys()
        assert all(names[f"{path}.weight"].shape[0] == out for path, (out, _) in layers.items() if "embed" not in path)


def test_labels_have_their_names_and_the_numbered_ones_none(tmp_path: Path) -> None:
    named = {"0": "good", "1": "LABEL_1", "2": "bad"}
    model = opened("bert/classify", tmp_path, id2label=named, label2id=None, problem_type="regression")
    assert model.labels == ("good", None, "bad")
    assert model.problem_type == "regression"


def test_two_labels_are_not_in_config_json(tmp_path: Path) -> None:
    """transformers leaves out what is its default."""
    directory = copied("bert/classify", tmp_path, id2label=None, label2id=None)
    tensors = load_file(directory / "model.safetensors")
    cut = {name: array[:2] if name.startswith("classifier") else array for name, array in tensors.items()}
    save_file(cut, directory / "model.safetensors")
    assert read_encoder(directory).labels == (None, None)


def test_weights_of_the_first_published_files_have_other_names(tmp_path: Path) -> None:
    wanted = opened("bert/classify", tmp_path / "new")
    directory = copied("bert/classify", tmp_path / "old")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): array
        for name, array in load_file(directory / "model.safetensors").items()
    }
    old["bert.embeddings.position_ids"] = np.arange(48)[None]
    save_file(old, directory / "model.safetensors")
    given = passages(wanted, 9, 20)
    for ours, theirs in zip(read(read_encoder(directory), given, 99), read(wanted, given, 99), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "modernbert", "deberta-v3"])
def test_a_body_is_taken_out_of_a_larger_model(name: str, tmp_path: Path) -> None:
    """What sentence-transformers saves of a masked language model: the body under its name, and a head."""
    directory = copied(f"{name}/embed", tmp_path / "whole")
    trunk = {"modernbert": "model", "deberta-v3": "deberta"}.get(name, name)
    class_name = json.loads((directory / "config.json").read_text())["architectures"][0]
    tensors = {f"{trunk}.{key}": array for key, array in load_file(directory / "model.safetensors").items()}
    save_file(tensors | {"cls.predictions.bias": np.zeros(3, np.float32)}, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    config["architectures"] = [class_name.removesuffix("Model") + "ForMaskedLM"]
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngineUnavailable, match="a masked language model is served for its vectors"):
        read_encoder(directory)
    (directory / "modules.json").write_text(json.dumps(MODULES))
    model, plain = read_encoder(directory), opened(f"{name}/embed", tmp_path / "plain")
    assert model.pooling == Pooling(("mean",), normalise=False)
    given = passages(model, 12)
    ours, theirs = (read(each, given, 99)[0] for each in (model, plain))
    theirs = theirs * np.linalg.norm(ours)
    assert_near(ours, theirs, NETWORK.of_logits(ours, 12))


def test_the_positions_bound_a_sequence_and_the_directory_bounds_it_further(tmp_path: Path) -> None:
    assert opened("bert/embed", tmp_path).limits.max_tokens == 48
    assert opened("roberta/embed", tmp_path / "behind").limits.max_tokens == 46
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
    assert read_encoder(tmp_path).limits.max_tokens == 20


@pytest.mark.parametrize(
    ("checkpoint", "changed", "without", "said"),
    [
        ("bert/classify", {"architectures": ["BertForQuestionAnswering"]}, (), "'BertForQuestionAnswering'"),
        ("bert/classify", {"architectures": ["RobertaForSequenceClassification"]}, (), "'RobertaForSequ"),
        ("bert/classify", {"architectures": None}, (), "names no architecture"),
        ("bert/classify", {"hidden_act": "gelu_10"}, (), "hidden_act is 'gelu_10'"),
        ("bert/classify", {}, ("classifier.weight",), "no matrix classifier.weight"),
        ("roberta/classify", {}, ("classifier.out_proj.weight",), "no matrix classifier.out_proj.weight"),
        ("bert/classify", {}, ("bert.pooler.dense.weight",), "bert.pooler.dense.weight"),
        ("bert/classify", {"id2label": {"0": "a", "1": "b"}}, (), "has 2 labels, and the head has 3"),
        ("bert/classify", {"num_labels": 5}, (), "has 5 labels, and the head has 3"),
        ("bert/classify", {"num_hidden_layers": 1}, (), "encoder.layer.1"),
        ("bert/classify", {"intermediate_size": 48}, (), "48"),
        ("deberta-v3/embed", {"share_att_key": False}, (), "pos_key_proj"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    checkpoint: str, changed: dict[str, Any], without: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    if "id2label" in changed or "num_labels" in changed:
        changed = {"id2label": None, "label2id": None} | changed
    directory = copied(checkpoint, tmp_path, without=without, **changed)
    with pytest.raises(EngineUnavailable) as refused:
        read_encoder(directory)
    assert said in refused.value.message and str(directory) in refused.value.message


def test_a_directory_without_weights_or_tokenizer_says_so(tmp_path: Path) -> None:
    directory = copied("bert/classify", tmp_path)
    (directory / "model.safetensors").unlink()
    with pytest.raises(EngineUnavailable, match="there are no weights"):
        read_encoder(directory)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(EngineUnavailable, match="holds no tokenizer"):
        read_encoder(directory)


def test_decoders_are_no_encoders() -> None:
    assert is_encoder({"model_type": "deberta-v2"}) and not is_encoder({"model_type": "qwen3"})
    assert not is_encoder({})


def test_a_body_in_bf16_keeps_its_dtype_where_the_device_has_it_and_its_head_is_float32(tmp_path: Path) -> None:
    directory = copied("bert/classify", tmp_path)
    tensors: dict[str, mx.array] = mx.load(str(directory / "model.safetensors"))  # type: ignore[assignment]
    mx.save_safetensors(
        str(directory / "model.safetensors"), {name: array.astype(mx.bfloat16) for name, array in tensors.items()}
    )
    model = read_encoder(directory)
    assert model.dtype == (mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16)
    for part in model.module.parts:
        assert {array.dtype for _, array in tree_flatten(part.parameters())} == {mx.float32}
    assert len(model.module.parts) == 2
