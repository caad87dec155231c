"""Pictures may stand on both sides of the border between a prompt and what a row begins with, and of no other one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import pytest

from rollout_server.engine.checks import check_group
from rollout_server.engine.kv_cache.prompt import Prompt
from rollout_server.engine.messages.scoring import RecordedRow
from rollout_server.errors import InvalidField
from rollout_server.rollout import PolicyAddress, Rollout, RolloutRequest, SamplingParams, Wants
from tests.engine.batch.test_row_prefix import prefix_of
from tests.laws.grids import some_long
from tests.support.engine.driver import recorded
from tests.support.numbers.bounds import assert_near
from tests.support.pictures.seeing import Conversation, Seeing, opened

GREEDY = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 20}


@pytest.fixture(scope="module", params=some_long(["qwen2_5_vl", "llava", "gemma3"], "qwen2_5_vl", "gemma3"))
def kind(request: pytest.FixtureRequest) -> Iterator[Seeing]:
    """Three axes, columns alone, and tokens that see each other."""
    with opened(request.param) as seeing:
        yield seeing


def sees_both_ways(seeing: Seeing) -> bool:
    return seeing.model.eyes is not None and seeing.model.eyes.family.sees_both_ways


def picture_of(seeing: Seeing, conversation: Conversation) -> tuple[int, int]:
    """The first column of its first picture, and the one behind its last."""
    placeholder = seeing.model.info.placeholder
    columns = [at for at, token in enumerate(conversation.ids) if token == placeholder]
    return columns[0], columns[-1] + 1


def group(conversation: Conversation, at: int, end: int) -> RolloutRequest:
    """A conversation up to `end`, of which the row begins with what stands behind `at`."""
    ids = conversation.ids[:end]
    return RolloutRequest(
        id="r", prompt_ids=ids[:at], sampling=SamplingParams(max_tokens=end), policy=PolicyAddress("base"), n=1,
        prompt_index=0, seeds=(0,), prefix=prefix_of(ids[at:]), pictures=conversation.pictures,
    )  # fmt: skip


def test_what_is_given_never_ends_in_a_picture_and_its_prompt_may(kind: Seeing) -> None:
    conversation = kind.conversations["one"]
    begin, end = picture_of(kind, conversation)
    for at in (begin, begin + 1, end):
        with pytest.raises(InvalidField, match="ends in a picture"):
            check_group(group(conversation, at, end), kind.model.info)
        check_group(group(conversation, at, end + 1), kind.model.info)
    # One more is none of the picture's: a model may have sampled it.
    sampled = replace(conversation, ids=(*conversation.ids[:end], conversation.ids[begin]))
    check_group(group(sampled, begin, end + 1), kind.model.info)


def test_no_chunk_goes_beyond_what_there_is(kind: Seeing) -> None:
    conversation = kind.conversations["one"]
    begin, end = picture_of(kind, conversation)
    assert kind.model.eyes is not None
    sight = kind.model.eyes.sight(conversation.ids, conversation.pictures)
    prompt = Prompt(conversation.ids[: end - 1], 0, prefilled=begin, sight=sight)
    assert prompt.chunk(end - begin - 1) == end - begin - 1


def test_rows_see_pictures_on_both_sides_of_the_border(kind: Seeing) -> None:
    conversation = kind.conversations["two"]
    begin, end = picture_of(kind, conversation)
    wants = Wants(prompt_logprobs=True, base_logprobs=True)
    shown = [conversation.pictures]
    (whole,) = kind.start().generate([conversation.ids], pictures=shown, wants=wants, **GREEDY)
    for at in (begin, begin + 1, end - 1, end):
        driver = kind.start(prefill_tokens=7)
        given = conversation.ids[at:]
        options = GREEDY | {"max_tokens": 20 + len(given)}
        (row,) = driver.generate(
            [conversation.ids[:at]], pictures=shown, prefix=prefix_of(given), wants=wants, **options
        )
        assert row.token_ids == given + whole.token_ids
        assert_near(row.logprobs[len(given) :], whole.logprobs, conversation.within)
        assert row.base_logprobs is not None and whole.base_logprobs is not None
        assert_near(row.base_logprobs[len(given) :], whole.base_logprobs, conversation.within)
        assert row.prompt_logprobs is not None and whole.prompt_logprobs is not None
        assert len(row.prompt_logprobs) == at
        assert_near(row.prompt_logprobs[1:], whole.prompt_logprobs[1:at], conversation.within)


def with_rest(row: Rollout, conversation: Conversation, at: int) -> RecordedRow:
    """A row of a whole conversation, as one that began with what stands behind `at`."""
    given = conversation.ids[at:]
    whole = recorded(row, pictures=conversation.pictures)
    (span,) = whole.spans
    return replace(
        whole,
        prompt_ids=conversation.ids[:at],
        token_ids=given + whole.token_ids,
        spans=(replace(span, end=len(given) + span.end),),
        judged=(False,) * len(given) + whole.judged,
        logprobs=(None,) * len(given) + whole.logprobs,
    )


def test_rows_whose_pictures_stand_in_what_they_began_with_are_drawn_again(kind: Seeing) -> None:
    conversation = kind.conversations["two"]
    begin, end = picture_of(kind, conversation)
    driver = kind.start(prefill_tokens=7)
    (whole,) = driver.generate([conversation.ids], pictures=[conversation.pictures], **GREEDY)
    for at in (begin, begin + 1, end - 1, end, end + 1):
        row = with_rest(whole, conversation, at)
        (found,) = driver.replay([row])
        assert found.exact and found.max_abs_logprob_difference is not None
        assert found.max_abs_logprob_difference <= conversation.within


def test_versions_change_at_no_place_within_a_picture_that_is_read_in_one_chunk(kind: Seeing) -> None:
    conversation = kind.conversations["one"]
    begin, end = picture_of(kind, conversation)
    driver, shown = kind.start(), conversation.pictures
    (whole,) = driver.generate([conversation.ids], pictures=[shown], **GREEDY)
    first = max(begin - 1, 1)
    row = with_rest(whole, conversation, first)
    (span,) = row.spans
    for at in range(first + 1, end + 3):
        # The token behind a border is predicted by the input in front of it.
        within = sees_both_ways(kind) and begin < at - 1 < end
        earlier, later = replace(span, end=at - first), replace(span, start=at - first)
        changing = replace(row, spans=(earlier, later))
        scored = (earlier, replace(later, end=len(conversation.ids) - first))
        with pytest.raises(InvalidField, match="within a picture") if within else nullcontext():
            assert driver.replay([changing])[0].exact
        with pytest.raises(InvalidField, match="within a picture") if within else nullcontext():
            (found,) = driver.score([conversation.ids], [first], spans=(scored,), pictures=(shown,))
            assert_near(found.logprobs, conversation.logprobs[first - 1 :], conversation.within)


def test_a_sequence_that_is_scored_ends_in_no_picture_that_is_read_in_one_chunk(kind: Seeing) -> None:
    conversation = kind.conversations["one"]
    _, end = picture_of(kind, conversation)
    with pytest.raises(InvalidField, match="within a picture") if sees_both_ways(kind) else nullcontext():
        (found,) = kind.start().score([conversation.ids[:end]], pictures=(conversation.pictures,))
        assert_near(found.logprobs[1:], conversation.logprobs[: end - 1], conversation.within)
