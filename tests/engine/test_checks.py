"""What is refused before it is queued: the least that is wrong is refused, and what lies just inside is not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rollout_server.engine.checks import check_generates, check_group, check_pictures, check_scoring
from rollout_server.engine.messages.options import KV_BUCKET, Embedding, ModelInfo, Task
from rollout_server.engine.messages.scoring import Classify, Embed, RecordedRow, Replay, Score
from rollout_server.errors import ContextExceeded, InvalidField, RolloutError
from rollout_server.rollout import PolicyAddress, RolloutRequest, SamplingParams, SpanAddress
from rollout_server.text.pictures.picture import Picture

POLICY = PolicyAddress("policy")
PLACEHOLDER = 9
INFO = ModelInfo(
    id="tiny",
    digest="sha256:0",
    model_type="qwen3",
    vocab_size=10,
    max_model_len=40,
    dtype="float32",
    quantization=None,
    eos_token_ids=(1,),
    parameters=1,
    layers={},
    kv_bytes_per_token=1,
    kv_memory=2 * KV_BUCKET,
    cache="slots",
    max_batch=4,
    device="cpu",
    embedding=Embedding(width=4, refusal=""),
)
SEES = replace(INFO, placeholder=PLACEHOLDER)
TWO_TOKENS = Picture("sha256:p", b"", (0,), (1, 1, 2), 2)


def group_of(prompt: tuple[int, ...] = (2, 3), max_tokens: int = 4, **fields: Any) -> RolloutRequest:
    params = {name: fields.pop(name) for name in ("stop_token_ids", "min_tokens") if name in fields}
    return RolloutRequest("r", prompt, SamplingParams(max_tokens, **params), POLICY, seeds=(0,), **fields)


def refused(kind: type[RolloutError], param: str, check: Any, *given: Any) -> str:
    with pytest.raises(kind) as caught:
        check(*given)
    assert caught.value.param == param
    return caught.value.message


# ---- groups -------------------------------------------------------------------------------------------------------


def test_the_context_holds_the_prompt_and_all_that_may_be_sampled_to_the_last_token() -> None:
    check_group(group_of((2,) * 30, 10), INFO)
    said = refused(ContextExceeded, "max_tokens", check_group, group_of((2,) * 30, 11), INFO)
    assert "30" in said and "11" in said and "40" in said


def test_one_row_has_to_fit_the_memory_of_all() -> None:
    check_group(group_of((2,) * 30, 10), INFO)
    tight = replace(INFO, kv_memory=KV_BUCKET)
    check_group(group_of((2,) * 30, 1), tight)
    refused(ContextExceeded, "max_tokens", check_group, group_of((2,) * 30, 2), tight)


@pytest.mark.parametrize("token", [-1, 10])
def test_a_token_outside_the_vocabulary_is_named(token: int) -> None:
    assert f"{token} " in refused(InvalidField, "prompt", check_group, group_of((9, token, 11)), INFO)
    said = refused(InvalidField, "stop_token_ids", check_group, group_of(stop_token_ids=(0, token)), INFO)
    assert f"{token} " in said


def test_some_token_has_to_be_left_until_min_tokens_are_there() -> None:
    all_but_the_end = (0, *range(2, 10))
    check_group(group_of(stop_token_ids=all_but_the_end), INFO)
    check_group(group_of(stop_token_ids=all_but_the_end[1:], min_tokens=1), INFO)
    refused(InvalidField, "min_tokens", check_group, group_of(stop_token_ids=all_but_the_end, min_tokens=1), INFO)


def test_who_has_no_vocabulary_says_where_to_ask_instead() -> None:
    routes: dict[Task, str] = {"embed": "/v1/embeddings", "classify": "/classify"}
    for task, route in routes.items():
        said = refused(InvalidField, "policy", check_generates, replace(INFO, task=task))
        assert route in said


# ---- pictures -----------------------------------------------------------------------------------------------------


def test_placeholders_are_as_many_as_the_pictures_have() -> None:
    check_group(group_of((2, PLACEHOLDER, PLACEHOLDER, 3), pictures=(TWO_TOKENS,)), SEES)
    for found in (1, 3):
        prompt = (2, *[PLACEHOLDER] * found, 3)
        refused(InvalidField, "prompt", check_group, group_of(prompt, pictures=(TWO_TOKENS,)), SEES)
    refused(InvalidField, "images", check_group, group_of(pictures=(TWO_TOKENS,)), INFO)
    check_group(group_of((2, PLACEHOLDER)), INFO)  # a token like another where the model sees nothing


def test_a_prompt_does_not_end_in_a_picture() -> None:
    refused(InvalidField, "prompt", check_group, group_of((2, *[PLACEHOLDER] * 2), pictures=(TWO_TOKENS,)), SEES)


def test_a_placeholder_that_was_sampled_is_text() -> None:
    given = (2, PLACEHOLDER, PLACEHOLDER)
    check_pictures(given, (*given, PLACEHOLDER), (TWO_TOKENS,), "rollouts", SEES)
    refused(InvalidField, "rollouts", check_pictures, given[:2], given[:2], (TWO_TOKENS,), "rollouts", SEES)


# ---- what is read -------------------------------------------------------------------------------------------------


def score_of(**fields: Any) -> Score:
    return Score("s", POLICY, **({"sequences": ((2, 3, 4),), "starts": (1,)} | fields))


def test_a_score_starts_within_its_sequence() -> None:
    for start in (0, 2):
        check_scoring(score_of(starts=(start,)), INFO)
    for start in (-1, 3):
        assert "3 tokens" in refused(InvalidField, "sequences", check_scoring, score_of(starts=(start,)), INFO)


def test_spans_of_a_score_tile_what_is_scored() -> None:
    whole = SpanAddress(POLICY, 0, 2)
    check_scoring(score_of(spans=((whole,),)), INFO)
    for spans in ((replace(whole, end=1),), (replace(whole, end=3),), (replace(whole, start=1),)):
        refused(InvalidField, "sequences", check_scoring, score_of(spans=(spans,)), INFO)


def test_a_sequence_may_be_as_long_as_the_context() -> None:
    check_scoring(score_of(sequences=((2,) * 40,)), INFO)
    refused(ContextExceeded, "sequences", check_scoring, score_of(sequences=((2,) * 41,)), INFO)
    refused(InvalidField, "temperature", check_scoring, score_of(temperature=0.0), INFO)


def test_a_replayed_row_has_a_prompt_and_arrays_of_one_length() -> None:
    row = RecordedRow(
        prompt_ids=(2,),
        token_ids=(3, 4),
        judged=(True, True),
        logprobs=(-1.0, -1.0),
        sampling=SamplingParams(4),
        seed=0,
        spans=(),
    )
    check_scoring(Replay("p", (row,)), INFO)
    for changed in (replace(row, logprobs=(-1.0,)), replace(row, judged=(True,)), replace(row, prompt_ids=())):
        refused(InvalidField, "rollouts", check_scoring, Replay("p", (changed,)), INFO)


def test_what_embeds_nothing_says_why() -> None:
    check_scoring(Embed("e", POLICY, ((2,),)), INFO)
    refused(InvalidField, "input", check_scoring, Embed("e", POLICY, ((2,), ())), INFO)
    unable = replace(INFO, embedding=Embedding())
    assert refused(InvalidField, "policy", check_scoring, Embed("e", POLICY, ((2,),)), unable) == Embedding().refusal


def classify_of(*positions: int, **fields: Any) -> Classify:
    return Classify("c", POLICY, ((2, 3, 4),), (positions,), **fields)


@pytest.mark.parametrize("positions", [(), (1, 1), (2, 1), (-1, 2), (0, 3)])
def test_positions_ascend_within_the_sequence(positions: tuple[int, ...]) -> None:
    check_scoring(classify_of(0, 1, 2), INFO)
    refused(InvalidField, "sequences", check_scoring, classify_of(*positions), INFO)


def test_an_encoder_scores_a_sequence_whole() -> None:
    encoder = replace(INFO, task="classify", encoder=True, token_types=2)
    check_scoring(classify_of(2), encoder)
    refused(InvalidField, "steps", check_scoring, classify_of(1), encoder)
    check_scoring(classify_of(2, types=((0, 1, 1),)), encoder)
    for types in ((0, 1), (0, 1, 2), (0, -1, 1)):
        refused(InvalidField, "sequences", check_scoring, classify_of(2, types=(types,)), encoder)
    refused(InvalidField, "policy", check_scoring, classify_of(2, label_token_ids=(3,)), encoder)
