"""Every family × what it is shown × how that is computed, against torch. Rows are made to sample what torch read, by a
grammar that lets nothing else come: so each step of theirs has a value to be compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from types import MappingProxyType

import numpy as np
import pytest

from adapters.formats.read import read_bundle
from rollout_server.engine.sampling.grammars import Grammars
from rollout_server.grammar import Grammar, GrammarKind
from rollout_server.rollout import Rollout, SamplingParams
from tests.laws.grids import corners, some_long
from tests.support.engine.driver import recorded
from tests.support.golden_vision import FAMILIES, GOLDEN
from tests.support.numbers.bounds import assert_near
from tests.support.pictures.seeing import Conversation, Seeing, opened

CHUNK = 7
"""Fewer tokens than any first picture has, so that all of those are cut, but where one has to be read at once."""


class Told:
    """Conversations as prompts that end behind the pictures, and rows that say the rest."""

    def __init__(self, seeing: Seeing) -> None:
        self.seeing = seeing
        self.driver = seeing.start(prefill_tokens=CHUNK)
        model, eyes = seeing.model, self.driver.model.eyes
        grammars = Grammars(model.host_tokenizer, model.info.vocab_size, model.info.eos_token_ids)
        self.given: dict[str, int] = {}
        self.sampling: dict[str, SamplingParams] = {}
        for name, each in seeing.conversations.items():
            sight = eyes.sight(each.ids, each.pictures) if eyes is not None else None
            # The token behind a picture's last may be the family's own mark of its end.
            self.given[name] = given = 4 if sight is None else sight.end + 1
            text = "start: " + " ".join(f"<[{token}]>" for token in each.ids[given:])
            grammar = grammars.compile(Grammar(GrammarKind.GRAMMAR, text), "structured_outputs")
            self.sampling[name] = SamplingParams(max_tokens=len(each.ids) - given, constraint=grammar)

    def submit(self, name: str, policy: str = "base", n: int = 1) -> str:
        each, sampling = self.seeing.conversations[name], self.sampling[name]
        return self.driver.submit(
            [each.ids[: self.given[name]]], pictures=[each.pictures], policy=policy, n=n, seed=2,
            max_tokens=sampling.max_tokens, constraint=sampling.constraint,
        )  # fmt: skip

    def rows(self, *ids: str) -> list[list[Rollout]]:
        self.driver.finish(*ids)
        return [self.driver.rollouts(id) for id in ids]

    def tail(self, name: str, values: np.ndarray | None = None) -> np.ndarray:
        """torch's values of what the row says, those of the base unless others are given."""
        all_of_them = self.seeing.conversations[name].logprobs if values is None else values
        return all_of_them[self.given[name] - 1 :]

    def check(self, rows: list[list[Rollout]], values: Callable[[Conversation], np.ndarray] | None = None) -> None:
        """Rows of each conversation, in their order."""
        for (name, each), own in zip(self.seeing.conversations.items(), rows, strict=True):
            for row in own:
                assert row.token_ids == each.ids[self.given[name] :]
                assert_near(row.logprobs, self.tail(name, values(each) if values else None), each.within, name)


def alone(told: Told) -> None:
    told.check([told.rows(told.submit(name))[0] for name in told.given])


def batched(told: Told) -> None:
    told.check(told.rows(*map(told.submit, told.given)))


def samples(told: Told) -> None:
    rows = told.rows(*(told.submit(name, n=4) for name in told.given))
    assert all(len(own) == 4 for own in rows)
    told.check(rows)


def preempted(told: Told) -> None:
    driver = told.driver
    ids = [told.submit(name) for name in told.given]
    driver.until(lambda: len([row for row in driver.batches.rows if row.token_ids]) == len(ids))
    limit = driver.kv_limit
    driver.set_kv_limit(1)
    driver.turn()
    # All but one, and fewer on a GPU, whose arrays are cut by halves: more than one row may find room.
    aside = len(driver.batches.preempted)
    assert aside == len(ids) - 1 or (driver.model.compiles and 0 < aside < len(ids) - 1)
    driver.set_kv_limit(limit)
    told.check(told.rows(*ids))


def replayed(told: Told) -> None:
    """What is compared with what is computed again is torch's."""
    rows = [own[0] for own in told.rows(*map(told.submit, told.given))]
    conversations = told.seeing.conversations
    sent = [
        recorded(row, pictures=conversations[name].pictures, logprobs=tuple(told.tail(name).tolist()))
        for name, row in zip(told.given, rows, strict=True)
    ]
    for name, found in zip(told.given, told.driver.replay(sent), strict=True):
        assert found.exact and found.max_abs_logprob_difference is not None
        assert found.max_abs_logprob_difference <= conversations[name].within, name


def scored(told: Told) -> None:
    conversations = list(told.seeing.conversations.values())
    found = told.driver.score(
        [each.ids for each in conversations], pictures=tuple(each.pictures for each in conversations)
    )
    for each, own in zip(conversations, found, strict=True):
        assert_near(own.logprobs[1:], each.logprobs, each.within)


def adapted(told: Told) -> None:
    """Beside rows of the base."""
    path = GOLDEN / told.seeing.path.name / "lora.safetensors"
    told.driver.push("lora", read_bundle(path.read_bytes(), None, layers=told.driver.model.info.layers))
    ids = [(told.submit(name, "lora"), told.submit(name)) for name in told.given]
    told.driver.finish(*(id for pair in ids for id in pair))
    told.check([told.driver.rollouts(lora) for lora, _ in ids], lambda each: each.adapted)
    told.check([told.driver.rollouts(base) for _, base in ids])
    assert all(np.abs(each.adapted - each.logprobs).max() > 0.01 for each in told.seeing.conversations.values())


WAYS: Mapping[str, Callable[[Told], None]] = MappingProxyType(
    {
        "alone": alone,
        "batched": batched,
        "preempted": preempted,
        "replayed": replayed,
        "scored": scored,
        "LoRA": adapted,
        "n=4": samples,
    }
)


@pytest.fixture(scope="module")
def families() -> Iterator[Callable[[str], Seeing]]:
    """Models that were opened, the last one alone: cases come family by family."""
    kept: list[tuple[str, Seeing]] = []
    with ExitStack() as stack:

        def family(name: str) -> Seeing:
            if not kept or kept[-1][0] != name:
                stack.close()
                kept.append((name, stack.enter_context(opened(name))))
            return kept[-1][1]

        yield family


@pytest.mark.parametrize(("name", "way"), corners(FAMILIES, list(WAYS)))
def test_what_a_family_is_shown_is_computed_as_torch_does(
    families: Callable[[str], Seeing], name: str, way: str
) -> None:
    WAYS[way](Told(families(name)))


@pytest.mark.parametrize("name", some_long(FAMILIES, "gemma3", "qwen3_vl"))
def test_chunks_end_within_pictures_but_where_one_is_read_at_once(families: Callable[[str], Seeing], name: str) -> None:
    told = Told(families(name))
    driver, shown = told.driver, told.seeing.conversations["one"]
    assert driver.model.eyes is not None
    sight = driver.model.eyes.sight(shown.ids, shown.pictures)
    assert sight is not None
    before, borders = driver.batches.prefilled, set()
    id = told.submit("one")
    while not any(row.token_ids for row in driver.batches.rows):
        driver.turn()
        borders.add(driver.batches.prefilled - before)
    within = {border for border in borders if any(begin < border < end for begin, end in sight.extents)}
    assert bool(within) != sight.sees_both_ways
    driver.finish(id)
