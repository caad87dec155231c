"""A field of an encoder's config.json is computed, changes nothing, or is refused by its name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rollout_server.engine.model.checkpoint.files import read_config
from rollout_server.engine.model.checkpoint.meaning import meaning_of
from rollout_server.engine.model.encoders.effects import unserved
from rollout_server.models.encoders.families import ENCODERS
from tests.support.golden_encoders import CHECKPOINTS, copied

ROPE = {"full_attention": {"rope_type": "default", "rope_theta": 160000.0}}
REFUSED: list[tuple[str, str, Any]] = [
    ("bert", "hidden_act", "gelu_10"),
    ("bert", "is_decoder", True),
    ("bert", "add_cross_attention", True),
    ("bert", "position_embedding_type", "relative_key"),
    ("bert", "num_attention_heads", 3),
    ("bert", "quantization", {"bits": 4, "group_size": 32}),
    ("bert", "quantization_config", {"quant_method": "awq"}),
    ("roberta", "position_embedding_type", "relative_key_query"),
    ("distilbert", "activation", "elu"),
    ("distilbert", "n_heads", 3),
    ("modernbert", "hidden_activation", "laplace"),
    ("modernbert", "classifier_activation", "leaky_relu"),
    ("modernbert", "head_dim", 6),
    ("modernbert", "layer_types", ["full_attention", "chunked_attention", "full_attention"]),
    (
        "modernbert",
        "rope_parameters",
        ROPE | {"sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    ),
    ("deberta-v3", "pooler_hidden_act", "hardtanh"),
    ("deberta-v3", "attention_head_size", 4),
    ("deberta-v3", "pooler_hidden_size", 24),
    ("deberta-v3", "position_buckets", 2),
    ("deberta-v2", "conv_kernel_size", 2),
    ("deberta-v2", "conv_act", "prelu"),
]
SAID_OF = {"layer_types": "chunked_attention", "rope_parameters": "rope_type of sliding_attention is 'linear'"}


def faults(directory: Path) -> list[str]:
    config = read_config(directory)
    return list(unserved(config, meaning_of(config), ENCODERS[config["model_type"]]))


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_what_transformers_saved_is_computed(checkpoint: str, tmp_path: Path) -> None:
    assert not faults(copied(checkpoint, tmp_path))


@pytest.mark.parametrize(("name", "field", "value"), REFUSED)
def test_what_is_not_computed_is_refused_by_its_name(name: str, field: str, value: Any, tmp_path: Path) -> None:
    (fault,) = faults(copied(f"{name}/classify", tmp_path, **{field: value}))
    assert SAID_OF.get(field, field) in fault


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "modernbert", "deberta-v3"])
def test_training_and_the_language_model_change_nothing(name: str, tmp_path: Path) -> None:
    common = {"initializer_range": 0.5, "tie_word_embeddings": False, "chunk_size_feed_forward": 7}
    own = {"dropout": 0.4} if name == "distilbert" else {"hidden_dropout_prob": 0.4}
    assert not faults(copied(f"{name}/classify", tmp_path, **common, **own, gradient_checkpointing=True))


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "modernbert", "deberta-v3"])
def test_a_field_that_a_later_transformers_declares_is_refused_unless_it_has_its_default(
    name: str, tmp_path: Path
) -> None:
    config = read_config(copied(f"{name}/classify", tmp_path))
    said = meaning_of(config)
    new = replace(said, declared=said.declared | {"key_factor"}, fields=said.fields | {"key_factor": 2.0})
    (fault,) = unserved(config, new, ENCODERS[config["model_type"]])
    assert fault.startswith("key_factor is 2.0, which")
    plain = replace(said, declared=said.declared | {"key_factor"}, fields=said.fields | {"key_factor": None})
    assert not list(unserved(config, plain, ENCODERS[config["model_type"]]))


def test_a_configuration_that_transformers_cannot_read_is_refused(tmp_path: Path) -> None:
    (fault,) = faults(copied("bert/classify", tmp_path, layer_norm_eps="small"))
    assert fault == "transformers does not read its config.json"


def test_roberta_needs_a_pad_id(tmp_path: Path) -> None:
    config = read_config(copied("roberta/classify", tmp_path)) | {"pad_token_id": None}
    (fault,) = unserved(config, meaning_of(config), ENCODERS["roberta"])
    assert fault.startswith("pad_token_id is null")
