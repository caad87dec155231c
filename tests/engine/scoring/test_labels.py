"""Label scores against the slow, obvious way: each sequence alone through mlx-lm's own layers, in one piece, and the
head in float64 behind it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from rollout_server.engine.messages.options import ModelInfo
from rollout_server.engine.model.load import read_model
from rollout_server.engine.scoring.labels import WORTH, alike
from rollout_server.errors import InvalidField, RolloutError
from tests.laws.grids import some_long
from tests.support import tiny_models, tiny_scorers
from tests.support.engine.driver import Driver, prompts_of
from tests.support.numbers.bounds import TINY, assert_near

FAMILIES = ("llama", "qwen3", "gemma2", "gemma3_text")
"""Plain attention, a tied embedding, one row at a time, sliding windows."""


def near(found: np.ndarray, expected: np.ndarray, length: int) -> None:
    assert_near(found, expected, TINY.of_logits(expected, length))


def by_rule(info: ModelInfo, directory: Path, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """[labels] of each row, where transformers reads it."""
    return [tiny_scorers.scores(directory, row)[info.head_position(row)] for row in rows]


@pytest.mark.parametrize("family", some_long(FAMILIES, "llama", "gemma3_text"))
def test_sequences_alone_together_and_in_chunks_have_the_scores_of_whole_ones(family: str, tmp_path: Path) -> None:
    tiny_scorers.build(family, tmp_path, labels=3)
    driver = Driver.start(tmp_path, prefill_tokens=24)
    rows = prompts_of([1, 31, 5, 77, 130], tiny_models.VOCAB_SIZE)
    expected = by_rule(driver.model.info, tmp_path, rows)
    for row, (found,), want in zip(rows, driver.classify(rows), expected, strict=True):
        near(found, want, len(row))
        near(driver.classify([row])[0][0], want, len(row))


@pytest.mark.parametrize("family", some_long(("llama", "gemma2"), "llama"))
def test_tokens_are_scored_where_they_are_asked_for(family: str, tmp_path: Path) -> None:
    tiny_scorers.build(family, tmp_path, labels=2, what="TokenClassification", bias=True)
    driver = Driver.start(tmp_path, prefill_tokens=16)
    rows = prompts_of([40, 3, 25], tiny_models.VOCAB_SIZE)
    places = [(0, 7, 8, 39), (1,), tuple(range(25))]
    for row, where, found in zip(rows, places, driver.classify(rows, positions=places), strict=True):
        assert_near(found, tiny_scorers.scores(tmp_path, row)[list(where)], TINY.of_logits(found, len(row)))


def test_a_head_of_two_layers_has_a_relu_between_them(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    width = tiny_scorers.HIDDEN
    shapes = {"0.weight": (width, width), "0.bias": (width,), "2.weight": (2, width), "2.bias": (2,)}
    head = {f"score.{name}": generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    tiny_scorers.build("qwen2", tmp_path, head=head, architectures=["Qwen2ForProcessRewardModel"])
    driver = Driver.start(tmp_path)
    (row,) = prompts_of([20], tiny_models.VOCAB_SIZE)
    inner = np.maximum(tiny_scorers.states(tmp_path, row) @ head["score.0.weight"].T + head["score.0.bias"], 0)
    expected = inner @ head["score.2.weight"].T + head["score.2.bias"]
    (found,) = driver.classify([row], positions=[range(20)])
    # Its own products are two more in a row, as wide as the model.
    assert_near(found, expected, 2 * width * TINY.of_logits(expected, 20) / width)


@pytest.mark.parametrize("pad", some_long(["own", "end", "none"], "own", "none"))
def test_a_row_is_read_at_its_rightmost_token_that_is_not_the_pad_token(pad: str, tmp_path: Path) -> None:
    tiny_scorers.build("llama", tmp_path, labels=1)
    special = tiny_models.write_tokenizer(tmp_path)
    token = {"own": special["<|pad|>"], "end": special["<|end|>"], "none": None}[pad]
    tiny_scorers.build("llama", tmp_path, labels=1, pad_token_id=token)
    driver = Driver.start(tmp_path)
    (row,) = prompts_of([12], 200)
    filler = special["<|pad|>"] if token is None else token
    rows = [row, [*row, filler], [filler, *row, filler, filler], [filler] * 4, [*row[:3], filler, *row[3:]]]
    places = [11, 11, 12, 0, 12] if token is not None else [len(row) - 1 for row in rows]
    assert [driver.model.info.head_position(row) for row in rows] == places
    for row, at, (found,) in zip(rows, places, driver.classify(rows), strict=True):
        near(found, tiny_scorers.scores(tmp_path, row)[at], len(row))


def test_what_stands_behind_the_last_position_is_not_read(tmp_path: Path) -> None:
    driver = Driver.start(tiny_scorers.build("llama", tmp_path))
    (row,) = prompts_of([50], tiny_models.VOCAB_SIZE)
    driver.classify([row], positions=[(9,)])
    assert driver.tokens_read == 10


@pytest.mark.parametrize("family", some_long(("llama", "gemma2"), "llama"))
def test_samples_of_one_prompt_read_it_once(family: str, tmp_path: Path) -> None:
    tiny_scorers.build(family, tmp_path, labels=2)
    driver = Driver.start(tmp_path, prefill_tokens=64)
    prompt, other, *tails = prompts_of([150, 90, *range(1, 13)], 200)
    rows = [prompt + tail for tail in tails] + [other, other + tails[0], other]
    for row, (found,), want in zip(
        rows, driver.classify(rows), by_rule(driver.model.info, tmp_path, rows), strict=True
    ):
        near(found, want, len(row))
    if family == "llama":
        # The last one ends where the shared beginning would: its last token is its own.
        assert driver.tokens_read <= 150 + sum(map(len, tails)) + 90 + 1 + 1 + len(tails[0])


def test_runs_that_begin_alike_are_found_and_not_made_worse() -> None:
    long, short = tuple(range(300)), tuple(range(WORTH))
    one = [(*long, at) for at in range(4)]
    assert alike(one, [len(row) - 1 for row in one]) == [([0, 1, 2, 3], 300)]
    # A beginning that all share would cost the four more than the fifth would save.
    five = [*one, (*short, 7, 7, 7)]
    assert alike(five, [len(row) - 1 for row in five]) == [([0, 1, 2, 3], 300), ([4], 0)]
    two = [(*short, 1), (*short, 2), (*short[:-1], 3, 3)]
    assert alike(two, [len(row) - 1 for row in two]) == [([0, 1], WORTH), ([2], 0)]
    # Nothing is shared that is wanted.
    assert alike(one, [10] * 4) == [([0], 0), ([1], 0), ([2], 0), ([3], 0)]
    assert alike([long, long], [WORTH, 299]) == [([0, 1], WORTH)]


@pytest.mark.parametrize("family", some_long(("llama", "gemma2"), "llama"))
def test_any_decoder_gives_log_probabilities_of_a_few_tokens(family: str, tmp_path: Path) -> None:
    driver = Driver.start(tiny_models.build(family, tmp_path), prefill_tokens=32)
    module = read_model(tmp_path).module
    rows, asked = prompts_of([40, 3, 25], tiny_models.VOCAB_SIZE), (7, 300, 7)
    places = [(10, 39), (2,), (0, 1, 24)]
    id = driver.ask_score(rows)
    found = driver.classify(rows, positions=places, label_token_ids=asked)
    for row, where, got in zip(rows, places, found, strict=True):
        logits = np.array(module(mx.array([row]), cache=make_prompt_cache(module))[0], np.float64)
        every = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        assert_near(got, every[list(where)][:, list(asked)], TINY.of_logits(logits, len(row)))
    assert [len(scored.logprobs) for scored in driver.scored(id)] == [len(row) for row in rows]


def test_beside_embeddings_and_each_other_nothing_is_mixed_up(tmp_path: Path) -> None:
    tiny_scorers.build("llama", tmp_path, labels=2)
    driver = Driver.start(tmp_path, prefill_tokens=48)
    rows = prompts_of([30, 9, 60, 17], tiny_models.VOCAB_SIZE)
    embeds, labels = driver.ask_embed(rows), driver.ask_classify(rows)
    everywhere = driver.ask_classify(rows, positions=[range(len(row)) for row in rows])
    for row, vector in zip(rows, driver.embedded(embeds), strict=True):
        near(vector, tiny_scorers.states(tmp_path, row)[-1], len(row))
    for row, found in zip(rows, driver.classified(labels), strict=True):
        near(found[0], tiny_scorers.scores(tmp_path, row)[driver.model.info.head_position(row)], len(row))
    for row, found in zip(rows, driver.classified(everywhere), strict=True):
        assert_near(found, tiny_scorers.scores(tmp_path, row), TINY.of_logits(found, len(row)))


def test_what_only_scores_samples_nothing_and_what_only_generates_scores_nothing(tmp_path: Path) -> None:
    scoring = Driver.start(tiny_scorers.build("llama", tmp_path / "rm"))
    id = scoring.submit([[1, 2, 3]])
    scoring.finish(id)
    assert isinstance(scoring.error(id), InvalidField)
    assert "base@0 scores labels" in scoring.error(id).message
    with pytest.raises(InvalidField, match="samples nothing"):
        scoring.score([[1, 2, 3]])
    generating = Driver.start(tiny_models.build("llama", tmp_path / "lm"))
    with pytest.raises(InvalidField, match="base@0 generates and has no head"):
        generating.classify([[1, 2, 3]])
    for driver in (scoring, generating):
        driver.turn()
        assert not driver.busy


def test_a_row_that_is_not_finite_fails_alone(tmp_path: Path) -> None:
    driver = Driver.start(tiny_scorers.build("llama", tmp_path))
    table = driver.model.module.model.embed_tokens
    table.weight[7] = float("nan")
    bad, good = driver.ask_classify([[1, 7, 2]]), driver.ask_classify([[1, 2, 3]])
    with pytest.raises(RolloutError, match="NaN or infinity while classifying under base@0"):
        driver.classified(bad)
    assert np.isfinite(driver.classified(good)[0]).all()
