"""Many sequences in one forward give what each gives alone on the slow path, and never hold up the rows that run."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from rollout_server.engine.kv_cache.prompt import Prompt
from rollout_server.engine.messages.scoring import ScoredSequence
from rollout_server.engine.messages.spans import tiling_fault
from rollout_server.engine.model.resident import ResidentModel
from rollout_server.engine.scoring import reader as score_module
from rollout_server.engine.scoring.batched import BatchedReader, _Part
from rollout_server.engine.scoring.sequential import SequentialReader
from rollout_server.errors import EngineUnavailable, NonFiniteLogits, UnknownPolicy, VersionGone
from rollout_server.rollout import PolicyAddress, Rollout, SpanAddress, Wants
from tests.laws.grids import corners
from tests.support.engine.driver import Driver, prompts_of
from tests.support.numbers.bounds import TINY, assert_near

LENGTHS = [1, 2, 3, 17, 31, 32, 33, 64, 100, 7, 130, 5]
UNSCORED = 80
"""Tokens before the first that is scored, at most."""


def slow(driver: Driver) -> Driver:
    """The same engine with the one-at-a-time reader."""
    reader = driver.reader
    assert isinstance(reader, BatchedReader)
    driver.set_reader(
        SequentialReader(driver.model.forward, driver.model.make_caches, driver.policies.route_rows, 100, lambda n: n)
    )
    return driver


def assert_close(found: list[ScoredSequence], expected: list[ScoredSequence]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert len(one.logprobs) == len(other.logprobs)
        values = np.array(other.logprobs, float)
        assert_near(np.array(one.logprobs, float), values, TINY.of_logprobs(values, UNSCORED + len(values)))


def spans_of(row: Rollout) -> tuple[SpanAddress, ...]:
    return tuple(
        SpanAddress(PolicyAddress(s.version.name, s.version.number), s.start, s.end, s.version.digest, s.kv)
        for s in row.spans
    )


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "gpt_oss"])
def test_batched_equals_one_at_a_time(
    family: str, bare_model: Callable[[str], ResidentModel], model_path: Callable[[str], Path]
) -> None:
    model = bare_model(family)
    sequences = prompts_of(LENGTHS, model.info.vocab_size)
    starts = [min(k % 4 * 9, len(s) - 1) for k, s in enumerate(sequences)]
    batched = Driver.start(model_path(family), model, max_batch=32, prefill_tokens=200)
    alone = slow(Driver.start(model_path(family), model, max_batch=32))
    found, expected = [each.score(sequences, starts) for each in (batched, alone)]
    assert_close(found, expected)
    assert [len(s.logprobs) for s in found] == [len(s) - start for s, start in zip(sequences, starts, strict=True)]


def test_extras_of_several_requests_in_one_batch(base: Driver) -> None:
    sequences = prompts_of([40, 25, 60], 286)
    asked = [
        {"temperature": 0.7, "entropy": True},
        {"top_logprobs": 3},
        {"temperature": 2.0, "entropy": True, "top_logprobs": 5},
    ]
    ids = [base.ask_score([s, s[:9]], **options) for s, options in zip(sequences, asked, strict=True)]
    together = [base.scored(id) for id in ids]
    alone = [
        slow(base).score([s, s[:9]], **o) if k == 0 else base.score([s, s[:9]], **o)
        for k, (s, o) in enumerate(zip(sequences, asked, strict=True))
    ]
    for found, expected, options in zip(together, alone, asked, strict=True):
        assert_close(found, expected)
        for one, other in zip(found, expected, strict=True):
            assert (one.entropy is None) == ("entropy" not in options)
            if one.entropy is not None:
                assert_near(one.entropy[1:], other.entropy[1:], 10 * TINY.of_logprobs(other.logprobs[1:], 60))
            if "top_logprobs" in options:
                assert one.top_logprobs is not None and other.top_logprobs is not None and one.top_logprobs[0] is None
                for mine, theirs in zip(one.top_logprobs[1:], other.top_logprobs[1:], strict=True):
                    assert [i for i, _ in mine] == [i for i, _ in theirs] and len(mine) == options["top_logprobs"]


def test_versions_share_a_forward(driver: Driver) -> None:
    for name, dora in (("a", False), ("b", True)):
        driver.push(name, driver.bundle(len(name) + ord(name), dora=dora))
    sequences = prompts_of([50, 30, 35], 286)
    alone = [driver.score([s], policy=p)[0] for s, p in zip(sequences, ("a", "b", "base"), strict=True)]
    sizes: list[int] = []
    watch(driver, sizes)
    ids = [driver.ask_score([s], policy=p) for s, p in zip(sequences, ("a", "b", "base"), strict=True)]
    assert_close([driver.scored(id)[0] for id in ids], alone)
    assert max(sizes) == 3, "all three in one forward"
    assert all(v.rows_in_use == 0 for policy in driver.status.policies for v in policy.versions)


def test_whoever_waits_longest_is_read_next(base: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many come after it, and whatever kind of part they are: newcomers stand first in the list here."""
    reader: Any = base.reader
    kind, fed = (False, False, None), list[list[int]]()
    patient = Prompt((7,) * 300, 0)

    def parts() -> list[_Part]:
        newcomers = [Prompt((5,) * 700, 0) for _ in range(2)]
        return [_Part(kind, 0, 0, each.tokens, 0, len(each.tokens), None, each) for each in (*newcomers, patient)]

    monkeypatch.setattr(reader, "_parts", parts)
    monkeypatch.setattr(reader, "_run", lambda pieces: fed.append([len(piece.tokens) for _, piece in pieces]))
    for _ in range(8):
        reader.read(1024)
    assert sum(300 in lengths for lengths in fed) >= 4 and any(300 not in lengths for lengths in fed)


def watch(driver: Driver, sizes: list[int], tokens: list[int] | None = None) -> None:
    """Notes rows and padded tokens of every forward of the scorer."""

    def noting(forward: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def noted(ids: mx.array, caches: list[Any]) -> mx.array:
            sizes.append(ids.shape[0])
            if tokens is not None:
                tokens.append(ids.size)
            return forward(ids, caches)

        return noted

    driver.read_by(noting)


def test_chunks_bound_the_logits(base: Driver, qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = prompts_of([90] * 6, 286)
    expected = base.score(sequences, [80] * 6)
    monkeypatch.setattr(score_module, "LOGIT_BYTES", 4 * base.model.info.vocab_size * 12)
    small = Driver.start(qwen, base.model)
    seen: list[int] = []
    watch(small, [], seen)
    whole = small.score(sequences)
    # Every input gives a value here, so all forwards pay for the head.
    assert max(seen) <= 12 and sum(seen) >= 6 * 89
    assert_close(small.score(sequences, [80] * 6), expected)
    assert_close([ScoredSequence(s.logprobs[80:]) for s in whole], expected)


def test_a_long_score_and_running_rows_take_turns(base: Driver, qwen: Path) -> None:
    (prompt, long) = prompts_of([20, 800], 286)
    expected = base.generate([prompt], n=4, seed=3, max_tokens=16, ignore_eos=True)
    (alone,) = base.score([long])
    driver = Driver.start(qwen, base.model, max_batch=64, prefill_tokens=48)
    tokens: list[int] = []
    watch(driver, [], tokens)
    rows = driver.submit([prompt], n=4, seed=3, max_tokens=16, ignore_eos=True)
    driver.until(lambda: driver.status.running == 4)
    driver.turn(2)
    id = driver.ask_score([long])
    progress = []
    while not driver.over(rows):
        read, steps = sum(tokens), driver.status.steps
        driver.turn()
        progress.append((sum(tokens) - read, driver.status.steps - steps))
    scored, stepped = np.array(progress[:-3]).T
    assert (stepped == 1).all() and (scored > 0).all() and scored.max() <= 48, progress
    assert not driver.is_scored(id), "the rows did not wait for the score"
    for row, same in zip(driver.rollouts(rows), expected, strict=True):
        assert row.token_ids == same.token_ids
    assert_close(driver.scored(id), [alone])


def test_a_short_score_passes_a_long_one(base: Driver, qwen: Path) -> None:
    driver = Driver.start(qwen, base.model, prefill_tokens=64)
    long, short = prompts_of([700, 60], 286)
    first = driver.ask_score([long] * 3)
    driver.turn(2)
    second = driver.ask_score([short])
    driver.turn(5)
    assert driver.is_scored(second) and not driver.is_scored(first)
    assert_close(driver.scored(first), [base.score([long])[0]] * 3)


def test_scoring_stays_inside_the_kv_memory_of_the_rows(bare_model: Callable[[str], ResidentModel], qwen: Path) -> None:
    model = bare_model("qwen3")
    limit = 8 * 96 * model.info.kv_bytes_per_token
    small = replace(model, info=replace(model.info, kv_memory=limit, max_batch=64))
    driver = Driver.start(qwen, small, prefill_tokens=64)
    prompts = prompts_of([20] * 10, 286)
    rows = driver.submit(prompts, max_tokens=40, ignore_eos=True)
    id = driver.ask_score(prompts_of([60] * 80, 286))
    largest, alone = 0, 96 * model.info.kv_bytes_per_token
    while not (driver.over(rows) and driver.is_scored(id)):
        driver.turn()
        scoring: Any = driver.reader
        held = driver.batch(0).store.nbytes + driver.scored_rows.nbytes
        # One sequence at a time may always be scored.
        assert held <= limit + (alone if scoring.size <= 1 else 0)
        largest = max(largest, scoring.size)
    assert largest > 1 and len(driver.rollouts(rows)) == 10
    assert driver.scoring.cells == 0 and driver.scored_rows.nbytes == 0


def test_what_was_scored_is_freed_at_once(base: Driver) -> None:
    """And not when somebody looks for objects that know each other."""
    id = base.ask_score(prompts_of([200] * 4, 286))
    gc.disable()
    try:
        base.until(lambda: base.reader.nbytes > 0)
        held = [weakref.ref(array) for array in base.scored_rows.arrays()]
        base.scored(id)
        assert held and {array() for array in held} == {None}
    finally:
        gc.enable()


def test_a_sequence_larger_than_the_memory_is_scored_all_the_same(
    bare_model: Callable[[str], ResidentModel], qwen: Path
) -> None:
    model = bare_model("qwen3")
    small = replace(model, info=replace(model.info, kv_memory=64 * model.info.kv_bytes_per_token))
    driver = Driver.start(qwen, small)
    id = driver.ask_score(prompts_of([300, 300], 286))
    rows = driver.submit(prompts_of([10], 286), max_tokens=8, ignore_eos=True)
    assert len(driver.scored(id)) == 2
    driver.finish(rows)
    assert len(driver.rollouts(rows)[0].token_ids) == 8


def test_a_broken_version_fails_its_request_alone(driver: Driver) -> None:
    driver.push("wild", driver.bundle(1, strength=1e25))
    sequences = prompts_of([40, 40], 286)
    expected = driver.score([sequences[0]])
    healthy = driver.ask_score([sequences[0]])
    wild = driver.ask_score([sequences[1]] * 3, policy="wild")
    assert_close(driver.scored(healthy), expected)
    with pytest.raises(NonFiniteLogits, match="wild@1"):
        driver.scored(wild)
    for found in driver.score([sequences[0]] * 4):
        assert_close([found], expected)
    assert driver.status.policies[0].versions[0].rows_in_use == 0


def test_an_ended_score_leaves_no_trace(driver: Driver) -> None:
    driver.push("p", driver.bundle(1))
    sequences = prompts_of([900, 40], 286)
    expected = driver.score([sequences[1]])
    id = driver.ask_score([sequences[0]] * 4, policy="p")
    other = driver.ask_score([sequences[0]])
    driver.turn(2)
    driver.abort(id, "disconnect")
    with pytest.raises(EngineUnavailable, match="disconnect"):
        driver.scored(id)
    assert driver.status.policies[0].versions[0].rows_in_use == 0
    assert len(driver.scored(other)[0].logprobs) == 900
    assert_close(driver.score([sequences[1]]), expected)


# ---- spans ---------------------------------------------------------------------------------------------------------


def switched(driver: Driver, dora: bool = False) -> Rollout:
    driver.push("p", driver.bundle(1, dora=dora))
    prompt = prompts_of([25], 286, seed=6)
    id = driver.submit(prompt, policy="p", seed=1, max_tokens=24, ignore_eos=True, on_update="switch")
    for seed in (2, 3):
        driver.turn(6)
        driver.push("p", driver.bundle(seed, dora=dora))
    driver.finish(id)
    (row,) = driver.rollouts(id)
    assert [(s.version.number, s.kv) for s in row.spans] == [(1, None), (2, "carried"), (3, "carried")]
    return row


@pytest.mark.parametrize(("dora", "path"), corners([False, True], [lambda driver: driver, slow]))
def test_a_switched_row_is_checked_through_its_spans(
    driver: Driver, dora: bool, path: Callable[[Driver], Driver]
) -> None:
    row = switched(driver, dora)
    tokens, start = row.prompt_ids + row.token_ids, len(row.prompt_ids)
    path(driver)
    plain, found = driver.score([tokens, tokens], [start, start], policy="p@3", spans=(None, spans_of(row)))
    assert_near(found.logprobs, row.logprobs, TINY.of_row(row))
    assert np.max(np.abs(np.subtract(plain.logprobs, row.logprobs))) > 1e-2
    assert found.spans == row.spans
    assert [(s.version.number, s.start, s.end) for s in plain.spans] == [(3, 0, len(row.token_ids))]
    assert all(v.rows_in_use == 0 for v in driver.status.policies[0].versions)


@pytest.mark.parametrize("path", [lambda driver: driver, slow], ids=["batched", "one at a time"])
def test_a_recomputed_span_reads_everything_before_it_again(driver: Driver, path: Callable[[Driver], Driver]) -> None:
    for seed in (1, 2):
        driver.push("p", driver.bundle(seed))
    (tokens,) = prompts_of([60], 286)
    path(driver)
    one, two = (PolicyAddress("p", number) for number in (1, 2))
    spans = (SpanAddress(one, 0, 15), SpanAddress(two, 15, 40, kv="recomputed"))
    (found,) = driver.score([tokens], [20], spans=(spans,))
    old, new = driver.score([tokens], [20], policy="p@1")[0], driver.score([tokens], [20], policy="p@2")[0]
    within = TINY.of_logprobs(old.logprobs + new.logprobs, 60)
    assert_near(found.logprobs[:15], old.logprobs[:15], within)
    assert_near(found.logprobs[15:], new.logprobs[15:], within)
    carried = (spans[0], replace(spans[1], kv="carried"))
    (mixed,) = driver.score([tokens], [20], spans=(carried,))
    assert np.max(np.abs(np.subtract(mixed.logprobs[15:], new.logprobs[15:]))) > 1e-3
    # From position 0 too, where the first token has no value.
    (whole,) = driver.score([tokens], spans=((SpanAddress(one, 0, 1), SpanAddress(two, 1, 60)),))
    assert_near(whole.logprobs[20:], new.logprobs, within)
    assert whole.logprobs[0] is None and len(whole.logprobs) == 60


def test_a_late_sample_is_all_of_the_version_it_switched_to(driver: Driver, qwen: Path) -> None:
    """Its prompt was read by version 1 for the first sample, and is read again: nothing of version 1 is in it."""
    small = Driver.start(qwen, driver.model, max_batch=1)
    small.push("p", small.bundle(1))
    prompt = prompts_of([25], 286)[0]
    id = small.submit([prompt], n=2, policy="p", max_tokens=8, ignore_eos=True, on_update="switch")
    small.turn(3)
    small.push("p", small.bundle(2))
    small.finish(id)
    row = small.rollouts(id)[1]
    (only,) = row.spans
    assert (only.version.number, only.kv) == (2, None)
    (found,) = small.score([row.prompt_ids + row.token_ids], [1], policy="p@2")
    assert_near(found.logprobs[24:], row.logprobs, TINY.of_row(row))


def test_spans_that_cannot_be_read_hold_nothing(driver: Driver) -> None:
    driver.push("p", driver.bundle(1))
    (tokens,) = prompts_of([10], 286)

    def ask(*spans: SpanAddress) -> None:
        driver.score([tokens], spans=(spans,), policy="p")

    with pytest.raises(UnknownPolicy, match="q") as caught:
        ask(SpanAddress(PolicyAddress("p", 1), 0, 5), SpanAddress(PolicyAddress("q", 1), 5, 10))
    assert caught.value.param == "sequences[0].versions[1]"
    with pytest.raises(UnknownPolicy, match="digest"):
        ask(SpanAddress(PolicyAddress("p", 1), 0, 10, digest="sha256:" + "0" * 64))
    small = Driver.start(Path(driver.model.info.id), driver.model, keep_versions=1)
    for seed in (1, 2, 3):
        small.push("p", small.bundle(seed))
    with pytest.raises(VersionGone, match="p@1"):
        small.score([tokens], spans=((SpanAddress(PolicyAddress("p", 1), 0, 10),),))
    for each in (driver, small):
        assert all(v.rows_in_use == 0 for v in each.status.policies[0].versions)


@pytest.mark.parametrize(
    ("edges", "kv", "says"),
    [
        ([(0, 4), (5, 10)], None, "span 1 covers 5 to 10"),
        ([(0, 4), (4, 4)], None, "span 1 covers 4 to 4"),
        ([(1, 10)], None, "starts at 0"),
        ([(0, 9)], None, "end at 9, but 10 tokens"),
        ([(0, 11)], None, "end at 11"),
        ([(0, 10)], "carried", "carries KV on"),
        ([], None, "end at 0"),
    ],
)
def test_spans_have_to_tile(edges: list[tuple[int, int]], kv: str | None, says: str) -> None:
    spans = [SpanAddress(PolicyAddress("p", 1), start, end, kv=kv) for start, end in edges]
    fault = tiling_fault(spans, 10)
    assert fault is not None and says in fault
    assert tiling_fault([SpanAddress(PolicyAddress("p", 1), 0, 10, kv="recomputed")], 10) is None


def test_prompt_logprobs_of_a_group_take_the_same_path(base: Driver) -> None:
    prompt = prompts_of([70], 286)
    (row,) = base.generate(prompt, max_tokens=4, wants=Wants(prompt_logprobs=True))
    expected = slow(base).score(prompt)
    assert row.prompt_logprobs is not None
    assert_close([ScoredSequence(row.prompt_logprobs)], expected)
