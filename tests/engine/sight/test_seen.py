"""Rows that see pictures are what torch computes, however they are cut, batched, dropped and read again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from mlx.utils import tree_flatten

from rollout_server.engine.messages.scoring import Classify, Embed, RecordedRow
from rollout_server.rollout import PolicyAddress, Rollout, Wants
from tests.laws.grids import some_long
from tests.support.engine.driver import Driver, recorded
from tests.support.golden_vision import FAMILIES
from tests.support.numbers.bounds import assert_near
from tests.support.pictures.seeing import DEEPEST, Conversation, Seeing, opened
from tests.support.tiny_models import VOCAB_SIZE
from tests.support.tiny_scorers import reward_bundle

GREEDY = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 6}
WANTED = Wants(prompt_logprobs=True, base_logprobs=True)
KINDS = ["qwen2_5_vl", "qwen3_vl", "gemma3", "mistral3"]
"""One family of each kind: three axes, deepstack with them, both ways, placeholders that do not stand together."""


@pytest.fixture(scope="module", params=some_long(FAMILIES, "gemma3", "llava", "mistral3", "qwen3_vl"))
def family(request: pytest.FixtureRequest) -> Iterator[Seeing]:
    with opened(request.param) as seeing:
        yield seeing


@pytest.fixture(scope="module", params=some_long(KINDS, "qwen3_vl", "gemma3"))
def kind(request: pytest.FixtureRequest) -> Iterator[Seeing]:
    with opened(request.param) as seeing:
        yield seeing


def asked(driver: Driver, conversations: list[Conversation], **options: object) -> list[Rollout]:
    shown = [each.pictures for each in conversations]
    return driver.generate([each.ids for each in conversations], pictures=shown, **options)  # type: ignore[arg-type]


def scored(driver: Driver, conversation: Conversation, row: Rollout, policy: str = "base") -> list[float | None]:
    sequence = conversation.ids + row.token_ids
    (found,) = driver.score([sequence], [len(conversation.ids)], policy, pictures=(conversation.pictures,))
    return list(found.logprobs)


def sent_back(rows: list[Rollout], conversations: list[Conversation]) -> list[RecordedRow]:
    return [recorded(row, pictures=conversations[row.prompt_index].pictures) for row in rows]


@pytest.mark.parametrize("chunk", [7, 512], ids=["in chunks", "at once"])
def test_given_tokens_have_the_log_probabilities_of_torch(family: Seeing, chunk: int) -> None:
    driver = family.start(prefill_tokens=chunk)
    for conversation in family.conversations.values():
        (found,) = driver.score([conversation.ids], [0], pictures=(conversation.pictures,))
        assert_near(found.logprobs[1:], conversation.logprobs, conversation.within)


def test_rows_alone_and_in_company_sample_what_torch_would(family: Seeing) -> None:
    driver, conversations = family.start(prefill_tokens=7), list(family.conversations.values())
    alone = [asked(driver, [each], wants=WANTED, **GREEDY)[0] for each in conversations]
    for row, conversation in zip(alone, conversations, strict=True):
        logits = conversation.logits.astype(np.float64)
        logprobs = logits - np.logaddexp.reduce(logits)
        assert row.prompt_logprobs is not None
        assert_near(row.prompt_logprobs[1:], conversation.logprobs, conversation.within)
        assert_near(row.logprobs[0], logprobs[row.token_ids[0]], conversation.within)
        assert logprobs[row.token_ids[0]] >= logprobs.max() - conversation.within
        assert_near(scored(driver, conversation, row), row.logprobs, conversation.within)
    together = asked(family.start(), conversations, wants=WANTED, **GREEDY)
    for row, other, conversation in zip(alone, together, conversations, strict=True):
        assert row.token_ids == other.token_ids
        assert_near(other.logprobs, row.logprobs, conversation.within)


def test_n_samples_see_the_pictures_and_are_drawn_again_exactly(kind: Seeing) -> None:
    driver, conversations = kind.start(), [kind.conversations["two"], kind.conversations["middle"]]
    rows = asked(driver, conversations, n=4, max_tokens=6, ignore_eos=True, seed=3)
    assert len({row.token_ids for row in rows}) > 2
    for row in rows:
        conversation = conversations[row.prompt_index]
        assert_near(scored(driver, conversation, row), row.logprobs, conversation.within)
    assert all(row.exact for row in driver.replay(sent_back(rows, conversations)))
    blind = [recorded(row) for row in rows]
    assert not all(row.exact for row in kind.start().replay(blind))


@pytest.mark.parametrize("kind", some_long(KINDS, "gemma3"), indirect=True)
def test_rows_that_step_aside_see_the_same_when_they_come_back(kind: Seeing) -> None:
    conversations = list(kind.conversations.values())
    options = {"max_tokens": 90, "ignore_eos": True, "seed": 5}
    expected = asked(kind.start(), conversations, **options)
    tight = kind.start(kv_memory=250 * kind.model.info.kv_bytes_per_token)
    found = asked(tight, conversations, **options)
    assert tight.preemptions > 0
    for row, other in zip(expected, found, strict=True):
        assert row.token_ids == other.token_ids
        assert_near(other.logprobs, row.logprobs, conversations[row.prompt_index].within)


def test_a_prefix_hit_with_pictures_reads_what_is_new_and_no_other_picture(kind: Seeing) -> None:
    driver, conversation = kind.start(), kind.conversations["two"]
    (first,) = asked(driver, [conversation], **GREEDY)
    before, eyes = driver.tokens_read, driver.model.eyes
    assert eyes is not None and eyes.looked == 2
    eyes.clear()
    longer = replace(conversation, ids=(*conversation.ids, *first.token_ids, 17, 18, 19))
    (second,) = asked(driver, [longer], **GREEDY)
    # All but the last sampled token of the first row was there, and the last given one is a step's.
    assert second.cached_tokens == len(conversation.ids) + len(first.token_ids) - 1
    assert driver.tokens_read - before == len(longer.ids) - 1 - second.cached_tokens
    assert eyes.looked == 2, "what their KV is there of needs no tower"
    (fresh,) = asked(kind.start(prefix_cache=False), [longer], **GREEDY)
    assert fresh.token_ids == second.token_ids
    assert_near(second.logprobs, fresh.logprobs, conversation.within)


def test_two_pictures_of_one_size_never_meet_in_the_prefix_cache() -> None:
    with opened("qwen2_5_vl") as seeing:
        driver, conversation = seeing.start(), seeing.conversations["one"]
        asked(driver, [conversation], **GREEDY)
        (picture,) = conversation.pictures
        pixels = np.frombuffer(picture.pixels, "<f4")[::-1].tobytes()
        other = type(picture)("sha256:" + "f" * 64, pixels, picture.shape, picture.grid, picture.tokens)
        shown = replace(conversation, pictures=(other,))
        (row,) = asked(driver, [shown], **GREEDY)
        # The token in front of the picture is the same, and too little to be worth a copy.
        assert row.cached_tokens == 0
        (fresh,) = asked(seeing.start(prefix_cache=False), [shown], **GREEDY)
        assert_near(row.logprobs, fresh.logprobs, conversation.within)


def test_adapters_on_the_language_half_see_too(kind: Seeing) -> None:
    driver, conversations = kind.start(), list(kind.conversations.values())
    for name, dora in (("lora", False), ("dora", True)):
        driver.push(name, driver.bundle(11, dora=dora))
        driver.push(f"{name}-merged", driver.bundle(11, dora=dora), mode="merged")
        rows = asked(driver, conversations, policy=name, wants=WANTED, **GREEDY)
        for row in rows:
            conversation = conversations[row.prompt_index]
            # Each of the two is as far as that from the exact value, and what is merged is rounded once more.
            assert_near(scored(driver, conversation, row, f"{name}-merged"), row.logprobs, 3 * conversation.within)
            assert row.base_logprobs is not None
            assert_near(scored(driver, conversation, row), row.base_logprobs, conversation.within)


def test_a_switch_to_other_parameters_reads_the_pictures_again(kind: Seeing) -> None:
    driver, conversation = kind.start(), kind.conversations["middle"]
    driver.push("p", driver.bundle(3), mode="merged")
    id = driver.submit(
        [conversation.ids], policy="p", on_update="switch", max_tokens=30, ignore_eos=True,
        pictures=[conversation.pictures],
    )  # fmt: skip
    driver.until(lambda: any(len(row.token_ids) > 5 for row in driver.batches.rows))
    driver.push("p", driver.bundle(4), mode="merged")
    driver.finish(id)
    (row,) = driver.rollouts(id)
    assert len(row.spans) == 2
    assert driver.replay(sent_back([row], [conversation]))[0].exact


def test_labels_and_vectors_see_the_pictures(kind: Seeing) -> None:
    driver, conversations = kind.start(prefill_tokens=7), list(kind.conversations.values())
    shown = tuple(each.pictures for each in conversations)
    sequences = tuple(each.ids for each in conversations)
    ends = tuple((len(ids) - 1,) for ids in sequences)
    labels = tuple(range(VOCAB_SIZE))
    driver.send(Classify("labels", PolicyAddress("base"), sequences, ends, labels, pictures=shown))
    for found, conversation in zip(driver.classified("labels"), conversations, strict=True):
        logits = conversation.logits.astype(np.float64)
        assert_near(found[0], logits - np.logaddexp.reduce(logits), conversation.within)
    driver.send(Embed("vectors", PolicyAddress("base"), sequences, shown))
    together = driver.embedded("vectors")
    for at, conversation in enumerate(conversations):
        driver.send(Embed(f"vector{at}", PolicyAddress("base"), (conversation.ids,), (conversation.pictures,)))
        (alone,) = driver.embedded(f"vector{at}")
        assert_near(together[at], alone, DEEPEST.of_logits(alone, len(conversation.ids)))
    blind = driver.embed([conversations[1].ids])
    assert np.max(np.abs(blind[0] - together[1])) > 0.01


def test_compiled_steps_turn_behind_pictures_too() -> None:
    with opened("qwen2_5_vl", compile_decode=True) as seeing, opened("qwen2_5_vl") as plain:
        assert seeing.model.compiles
        conversations = list(seeing.conversations.values())
        rows = asked(seeing.start(), conversations, **GREEDY)
        for row, other in zip(rows, asked(plain.start(), conversations, **GREEDY), strict=True):
            conversation = conversations[row.prompt_index]
            assert row.token_ids == other.token_ids
            assert_near(row.logprobs, other.logprobs, conversation.within)


@pytest.mark.long
def test_200_rollouts_with_pictures_are_drawn_again_exactly(kind: Seeing) -> None:
    driver, conversations = kind.start(), list(kind.conversations.values())
    rows = asked(driver, conversations, n=50, max_tokens=40, seed=8, temperature=1.1, top_p=0.95)
    assert len(rows) == 200
    for row, again in zip(rows, driver.replay(sent_back(rows, conversations)), strict=True):
        # A uniform may fall on the edge between two tokens: one in some hundred thousand does.
        tie = again.margin is not None and again.margin <= conversations[row.prompt_index].within
        assert again.exact or tie, again


def test_a_reward_version_scores_what_it_sees(kind: Seeing) -> None:
    driver, conversations = kind.start(prefill_tokens=7), list(kind.conversations.values())
    info = kind.model.info
    head = np.random.default_rng(9).standard_normal((2, info.embedding.width)).astype(np.float32)
    driver.push("rm", reward_bundle(info, 6, head={"score.weight": head}))
    shown = tuple(each.pictures for each in conversations)
    sequences = tuple(each.ids for each in conversations)
    ends = tuple((len(ids) - 1,) for ids in sequences)
    driver.send(Classify("scores", PolicyAddress("rm"), sequences, ends, pictures=shown))
    found = np.concatenate(driver.classified("scores"))
    driver.send(Embed("states", PolicyAddress("rm"), sequences, shown))
    want = driver.embedded("states").astype(np.float64) @ head.T
    assert_near(found, want, DEEPEST.of_logits(want, max(map(len, sequences))))
    blind = driver.classify([conversations[1].ids], "rm")[0]
    assert np.max(np.abs(blind - found[1])) > 0.01


def test_stacks_of_experts_lie_row_by_row_in_memory() -> None:
    """Or MLX's product of tokens sorted by expert takes others' matrices on CUDA."""
    with opened("qwen3_vl_moe") as seeing:
        module = seeing.start().model.module
        stacks = {path: array for path, array in tree_flatten(module.parameters()) if array.ndim == 3}
        assert stacks and all(memoryview(array).c_contiguous for array in stacks.values()), list(stacks)
