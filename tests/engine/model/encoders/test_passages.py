"""Which sequences share a forward, pairs, and what an encoder does not take."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from rollout_server.engine.model.encoders.passages import Limits, Passage, groups, tokenised, width_of
from rollout_server.errors import ContextExceeded, InvalidField
from tests.support.tiny_models import write_tokenizer

LIMITS = Limits(vocabulary=100, max_tokens=8, token_types=2)


@given(st.lists(st.integers(1, 2000), max_size=60), st.integers(1, 5000))
def test_every_sequence_is_in_one_group_within_the_budget(lengths: list[int], budget: int) -> None:
    found = list(groups(lengths, budget))
    assert sorted(index for group in found for index in group) == list(range(len(lengths)))
    for group in found:
        widths = {width_of(lengths[index]) for index in group}
        assert len(widths) == 1
        assert len(group) == 1 or len(group) * widths.pop() <= budget


@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), st.integers(500, 5000))
def test_no_group_could_have_taken_the_first_of_the_next_one(lengths: list[int], budget: int) -> None:
    found = list(groups(lengths, budget))
    for one, following in pairwise(found):
        width = width_of(lengths[one[0]])
        assert width_of(lengths[following[0]]) < width or (len(one) + 1) * width > budget


@given(st.integers(1, 100_000))
def test_a_width_is_little_more_than_the_length(length: int) -> None:
    width = width_of(length)
    assert length <= width and width % 8 == 0
    assert width - length < (8 if length <= 64 else length / 4)


@pytest.mark.parametrize(
    ("passage", "error", "said"),
    [
        (Passage(()), InvalidField, "no tokens"),
        (Passage((1,) * 9), ContextExceeded, "9 tokens exceeds the 8"),
        (Passage((1, 100)), InvalidField, "Token id 100 is outside the vocabulary of 100"),
        (Passage((1, -1)), InvalidField, "Token id -1"),
        (Passage((1, 2), (0,)), InvalidField, "2 tokens and 1 token types"),
        (Passage((1, 2), (0, 2)), InvalidField, "(0 to 1)"),
    ],
)
def test_what_it_does_not_take_is_said(passage: Passage, error: type[InvalidField], said: str) -> None:
    with pytest.raises(error) as refused:
        LIMITS.check(passage, "input")
    assert said in refused.value.message and refused.value.param == "input"


def test_a_model_without_token_types_takes_zeros_only() -> None:
    none = Limits(100, 8, 0)
    none.check(Passage((1, 2), (0, 0)), "input")
    with pytest.raises(InvalidField, match="none"):
        none.check(Passage((1, 2), (0, 1)), "input")


def test_a_pair_has_the_template_and_the_types_of_its_tokenizer(tmp_path: Path) -> None:
    special = write_tokenizer(tmp_path)
    file = str(tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.from_file(file)
    first, end = "<|user|>", "<|end|>"
    tokenizer.post_processor = TemplateProcessing(
        single=f"{first}:0 $A:0 {end}:0",
        pair=f"{first}:0 $A:0 {end}:0 $B:1 {end}:1",
        special_tokens=[(first, special[first]), (end, special[end])],
    )
    tokenizer.save(file)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    loaded.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    alone, other = (tokenised(loaded, text, token_types=2) for text in ("the and", "wo"))
    assert alone.ids[0] == special[first] and alone.ids[-1] == special[end] and alone.types == ()
    pair = tokenised(loaded, "the and", "wo", token_types=2)
    assert pair.ids == alone.ids + other.ids[1:]
    assert pair.types == (0,) * len(alone.ids) + (1,) * (len(other.ids) - 1)
    assert tokenised(loaded, "the and", "wo", token_types=1) == Passage(pair.ids)
