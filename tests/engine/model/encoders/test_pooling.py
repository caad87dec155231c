"""Vectors by the files of sentence-transformers, against the definitions of its modes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from rollout_server.engine.model.encoders.pooling import FLAGS, Pooling, read_pooling
from rollout_server.errors import EngineUnavailable
from tests.support.numbers.bounds import relative

DEFINITIONS = {
    "cls": lambda states: states[0],
    "max": lambda states: states.max(axis=0),
    "mean": lambda states: states.mean(axis=0),
    "mean_sqrt_len_tokens": lambda states: states.sum(axis=0) / len(states) ** 0.5,
    "weightedmean": lambda states: np.average(states, axis=0, weights=np.arange(1, len(states) + 1)),
    "lasttoken": lambda states: states[-1],
}


def module(kind: str, path: str = "") -> dict[str, Any]:
    return {"idx": 0, "name": "0", "path": path, "type": f"sentence_transformers.models.{kind}"}


def written(directory: Path, modules: list[dict[str, Any]] | None = None, **files: Any) -> Path:
    if modules is not None:
        (directory / "modules.json").write_text(json.dumps(modules))
    for name, content in files.items():
        folder = directory / name if name[0].isdigit() else directory
        folder.mkdir(exist_ok=True)
        (folder / ("config.json" if name[0].isdigit() else f"{name}.json")).write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mode", FLAGS.values())
def test_every_mode_is_its_definition(mode: str, padded: bool) -> None:
    lengths = [5, 1, 8] if padded else [8, 8, 8]
    states = np.random.default_rng(1).standard_normal((3, 8, 6)).astype(np.float32) * 3
    columns = np.arange(8)[None] < np.array(lengths)[:, None]
    garbage = np.where(columns[..., None], states, np.nan).astype(np.float32)
    found = np.array(Pooling((mode,), normalise=False).of(mx.array(garbage), mx.array(lengths) if padded else None))
    expected = [DEFINITIONS[mode](row[:length].astype(np.float64)) for row, length in zip(states, lengths, strict=True)]
    np.testing.assert_allclose(found, expected, atol=relative(16) * np.abs(states).max() * 3, rtol=0)


def test_several_modes_stand_one_behind_the_other_and_are_normalised_together() -> None:
    states = mx.random.normal((2, 4, 3), key=mx.random.key(0))
    apart = [np.array(Pooling((mode,), normalise=False).of(states, None)) for mode in ("cls", "max")]
    joined = np.concatenate(apart, axis=-1)
    found = np.array(Pooling(("cls", "max")).of(states, None))
    np.testing.assert_allclose(
        found, joined / np.linalg.norm(joined, axis=-1, keepdims=True), atol=relative(16), rtol=0
    )


def test_bf16_states_are_pooled_in_float32() -> None:
    states = (mx.random.normal((1, 300, 4), key=mx.random.key(0)) + 5).astype(mx.bfloat16)
    found = Pooling(normalise=False).of(states, None)
    assert found.dtype == mx.float32
    expected = np.array(states.astype(mx.float32), np.float64).mean(axis=1)
    np.testing.assert_allclose(np.array(found), expected, atol=relative(300) * 10, rtol=0)


def test_a_zero_vector_stays_zero() -> None:
    assert np.array(Pooling().of(mx.zeros((1, 2, 3)), None)).tolist() == [[0, 0, 0]]


def test_without_files_it_is_the_normalised_mean(tmp_path: Path) -> None:
    assert read_pooling(tmp_path) == Pooling(("mean",), True, None)


def test_older_files_have_a_flag_for_each_mode_and_a_bound(tmp_path: Path) -> None:
    flags = {"word_embedding_dimension": 6, "pooling_mode_lasttoken": True, "pooling_mode_cls_token": True}
    modules = [module("Transformer"), module("Pooling", "1_Pooling")]
    written(tmp_path, modules, **{"1_Pooling": flags, "sentence_bert_config": {"max_seq_length": 99}})
    assert read_pooling(tmp_path) == Pooling(("cls", "lasttoken"), False, 99)


def test_newer_files_have_names_and_the_pooling_lies_where_modules_say(tmp_path: Path) -> None:
    modules = [module("Transformer"), module("Pooling", "3_Pooling"), module("Normalize", "4_Normalize")]
    written(tmp_path, modules, **{"3_Pooling": {"pooling_mode": ["max", "cls"]}})
    assert read_pooling(tmp_path) == Pooling(("max", "cls"), True, None)


def test_a_pooling_without_any_mode_is_the_mean(tmp_path: Path) -> None:
    modules = [module("Transformer"), module("Pooling", "1_Pooling")]
    written(tmp_path, modules, **{"1_Pooling": {"pooling_mode_cls_token": False}})
    assert read_pooling(tmp_path).modes == ("mean",)


@pytest.mark.parametrize(
    ("modules", "files", "said"),
    [
        ([module("Transformer"), module("Dense", "2_Dense")], {}, "a module of type Dense"),
        ([module("WordEmbeddings")], {}, "a module of type WordEmbeddings"),
        (None, {"1_Pooling": {"pooling_mode": "attention"}}, "pooling_mode is attention"),
        (None, {"1_Pooling": {"pooling_mode": []}}, "pooling_mode is nothing"),
        (None, {"sentence_bert_config": {"do_lower_case": True}}, "do_lower_case"),
        (None, {"sentence_bert_config": [1]}, "has to hold an object"),
        ([{"idx": 0}], {}, "cannot be read (KeyError: 'type')"),
    ],
)
def test_what_is_not_computed_is_refused(modules: Any, files: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailable) as refused:
        read_pooling(written(tmp_path, modules, **files))
    assert said in refused.value.message
