"""How rows end, and that every way to end reports them once."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rollout_server.engine.batch.row import Group, Row
from rollout_server.engine.messages.control import Stop
from rollout_server.engine.messages.rollouts import RequestDone, RequestFailed
from rollout_server.engine.messages.scoring import Score
from rollout_server.engine.messages.versions import Delete
from rollout_server.errors import EngineUnavailable, NeverAdmitted
from rollout_server.http.replies.json_entries import rollout_text
from rollout_server.rollout import (
    FinishReason,
    PolicyAddress,
    PolicyVersion,
    RolloutRequest,
    SamplingParams,
    Wants,
)
from rollout_server.text.detokenize import IncrementalText
from tests.support import tiny_models
from tests.support.engine.driver import Driver, prompts_of
from tests.support.numbers.bounds import TINY, assert_near
from tests.support.tiny_tokenizers import spaces

PROMPT = prompts_of([10], 286, seed=8)[0]


def test_the_end_token_belongs_to_the_row(base: Driver) -> None:
    (end,) = base.model.info.eos_token_ids
    rows = base.generate([PROMPT], n=32, max_tokens=40)
    stopped = [row for row in rows if row.finish_reason is FinishReason.STOP]
    assert stopped, "no row of 32 met the end token"
    for row in rows:
        if row.finish_reason is FinishReason.STOP:
            assert row.token_ids[-1] == row.stop_reason == end and end not in row.token_ids[:-1]
        else:
            assert row.finish_reason is FinishReason.LENGTH and len(row.token_ids) == 40
        assert len(row.token_ids) == len(row.logprobs) == row.spans[-1].end and row.spans[0].start == 0
    going_on = base.generate([PROMPT], n=32, max_tokens=40, ignore_eos=True)
    assert all(row.finish_reason is FinishReason.LENGTH and len(row.token_ids) == 40 for row in going_on)
    # Up to its end the same seed draws the same tokens.
    for short, long in zip(rows, going_on, strict=True):
        assert long.token_ids[: len(short.token_ids)] == short.token_ids


def test_stop_ids_and_min_tokens(base: Driver) -> None:
    free = base.generate([PROMPT], seed=1, max_tokens=30, ignore_eos=True)[0]
    stop = free.token_ids[5]
    first = free.token_ids.index(stop)
    row = base.generate([PROMPT], seed=1, max_tokens=30, ignore_eos=True, stop_token_ids=(stop,))[0]
    assert row.token_ids == free.token_ids[: first + 1]
    assert (row.finish_reason, row.stop_reason) == (FinishReason.STOP, stop)
    held = base.generate([PROMPT], seed=1, max_tokens=30, min_tokens=20, stop_token_ids=(stop,), n=8)
    (end,) = base.model.info.eos_token_ids
    for row in held:
        assert len(row.token_ids) >= 20 and not {stop, end} & set(row.token_ids[:20])
        # What was banned is missing from the sampling distribution, not from the model's.
        assert all(s >= m - TINY.of_row(row) for s, m in zip(row.sampling_logprobs, row.logprobs, strict=True))
        assert max(s - m for s, m in zip(row.sampling_logprobs[:20], row.logprobs[:20], strict=True)) > 1e-6


def test_a_stop_string_ends_the_row_at_the_token_that_completes_it(base: Driver) -> None:
    free = base.generate([PROMPT], seed=2, max_tokens=40, ignore_eos=True, temperature=1.5)[0]
    tokenizer = base.model.host_tokenizer
    text = tokenizer.decode(free.token_ids, skip_special_tokens=True)
    plain = [i for i in range(len(text) - 3) if "\ufffd" not in text[i : i + 3]]
    stop = text[plain[len(plain) // 2] :][:3]
    row = base.generate([PROMPT], seed=2, max_tokens=40, ignore_eos=True, temperature=1.5, stop=("never there", stop))[
        0
    ]
    assert (row.finish_reason, row.stop_reason) == (FinishReason.STOP, stop)
    count = len(row.token_ids)
    assert row.token_ids == free.token_ids[:count]
    assert stop in tokenizer.decode(row.token_ids, skip_special_tokens=True)
    assert stop not in tokenizer.decode(row.token_ids[:-1], skip_special_tokens=True)


def test_64_stop_strings_end_a_row_where_a_search_of_all_its_text_would(base: Driver) -> None:
    """Short strings, so that some span tokens, some overlap and some stand in the tokens before min_tokens."""
    tokenizer, generator = base.model.host_tokenizer, random.Random(5)
    ended = 0
    for trial in range(25):
        ids = [generator.randrange(5, base.model.info.vocab_size) for _ in range(40)]
        text = tokenizer.decode(ids)
        stops = {text[at : at + generator.randrange(1, 9)] for at in generator.sample(range(len(text) - 9), 8)}
        stops |= {f"never {k}" for k in range(50)}
        sampling = SamplingParams(max_tokens=40, min_tokens=trial % 5, stop=tuple(sorted(stops)), ignore_eos=True)
        request = RolloutRequest("r", (1,), sampling, PolicyAddress("base"), seeds=(0,))
        row = Row(Group(request), 0, 0, PolicyVersion("base", 0, "sha256:0"), 0, IncrementalText(tokenizer))
        seen, expected = IncrementalText(tokenizer), None
        for count, token in enumerate(ids, 1):
            before = seen.length
            seen.push([token])
            if count == len(ids):
                seen.finish()
            ends = [(at, stop) for stop in stops for at in range(seen.length) if seen.text.startswith(stop, at)]
            hits = [(at, stop) for at, stop in ends if at + len(stop) > before]
            if hits and count >= sampling.min_tokens:
                expected = (count, min(hits)[1])
                break
        while row.running:
            row.record(ids[len(row.token_ids)], (0.0, 0.0, 0.0), None, frozenset())
        ended += expected is not None
        assert (len(row.token_ids), row.stop_reason) == (expected or (40, None))
    assert ended > 15


@pytest.mark.parametrize("ending", ["length", "end token", "stop token"])
def test_a_row_that_ends_inside_of_a_character_has_shown_it(base: Driver, ending: str) -> None:
    """Its U+FFFD counts as text: a stop string that it completes has ended the row."""
    tokenizer, (end,) = base.model.host_tokenizer, base.model.info.eos_token_ids
    ids = tokenizer.convert_tokens_to_ids(["a", "Ã", "b"])[: 2 if ending == "length" else 3]
    last = {"length": ids[-1], "end token": end, "stop token": ids[-1]}[ending]
    ids[-1] = last
    stops = {"a\ufffd": "a\ufffd", "\ufffd": "\ufffd", "\ufffdb": None if ending == "length" else last, "a": "a"}
    for stop, reason in stops.items():
        token = (last,) if ending == "stop token" else ()
        sampling = SamplingParams(max_tokens=len(ids), stop=(stop,), stop_token_ids=token)
        request = RolloutRequest("r", (1,), sampling, PolicyAddress("base"), seeds=(0,))
        text = IncrementalText.of(tokenizer, request)
        row = Row(Group(request), 0, 0, PolicyVersion("base", 0, "sha256:0"), 0, text)
        while row.running:
            row.record(ids[len(row.token_ids)], (0.0, 0.0, 0.0), None, frozenset([end]))
        assert (row.stop_reason, row.finish_reason) == (reason, FinishReason.LENGTH if reason is None else "stop")
        whole = rollout_text(row.rollout(), tokenizer, request)
        assert stop not in whole and "a\ufffd".startswith(whole)


def test_a_stop_string_is_looked_for_in_the_text_that_is_shown(base: Driver) -> None:
    """Behind the prompt, and with the special tokens that the reader of the row sees."""
    tokenizer = spaces()
    mask, word = tokenizer.convert_tokens_to_ids("<mask>"), tokenizer.convert_tokens_to_ids("▁a")
    for shown, continues, stop, reason in (
        ((), True, " a", " a"),
        ((), False, " a", None),
        ((), True, " a a", " a a"),
        ((mask,), True, " a a", None),
        ((mask,), True, "a<mask>", "a<mask>"),
        ((), True, "a<mask>", None),
    ):
        sampling = SamplingParams(max_tokens=3, stop=(stop,))
        request = RolloutRequest("r", (2,), sampling, PolicyAddress("base"), seeds=(0,), continues=continues)
        request = replace(request, shown=frozenset(shown))
        text = IncrementalText.of(tokenizer, request)
        row = Row(Group(request), 0, 0, PolicyVersion("base", 0, "sha256:0"), 0, text)
        for token in (word, mask, mask if stop == " a" else word):
            if row.running:
                row.record(token, (0.0, 0.0, 0.0), None, frozenset())
        assert row.stop_reason == reason
        assert stop not in rollout_text(row.rollout(), tokenizer, request)


def test_a_stop_beats_length_at_the_last_token(base: Driver) -> None:
    free = base.generate([PROMPT], seed=3, max_tokens=6, ignore_eos=True)[0]
    stop = free.token_ids[-1]
    if stop in free.token_ids[:-1]:
        raise AssertionError("choose another seed: the last token is not new")
    row = base.generate([PROMPT], seed=3, max_tokens=6, ignore_eos=True, stop_token_ids=(stop,))[0]
    assert row.finish_reason is FinishReason.STOP and row.token_ids == free.token_ids


def test_abort_keeps_what_rows_have(base: Driver) -> None:
    expected = base.generate([PROMPT], seed=4, max_tokens=50, ignore_eos=True)[0]
    id = base.submit([PROMPT], seed=4, n=2, max_tokens=50, ignore_eos=True)
    base.turn(9)
    base.abort(id)
    base.finish(id, turns=3)
    rows = base.rollouts(id)
    assert [row.finish_reason for row in rows] == [FinishReason.ABORTED] * 2 and rows[0].stop_reason == "abort"
    assert 0 < len(rows[0].token_ids) < 50
    assert rows[0].token_ids == expected.token_ids[: len(rows[0].token_ids)]
    assert rows[0].spans[-1].end == len(rows[0].token_ids)
    base.abort(id)
    base.turn(3)
    assert len(base.rollouts(id)) == 2


def test_abort_in_the_queue_and_in_prefill(base: Driver, qwen) -> None:  # type: ignore[no-untyped-def]
    small = Driver.start(qwen, base.model, max_batch=2, prefill_tokens=8)
    small.set_max_rows(2)
    slow = small.submit(prompts_of([100], 286), max_tokens=4, ignore_eos=True)
    queued = small.submit([PROMPT], n=5, max_tokens=4, ignore_eos=True)
    small.turn(2)
    assert small.batches.joining
    small.abort(slow)
    small.abort(queued)
    small.finish(slow, queued, turns=4)
    assert [row.token_ids for row in small.rollouts(slow) + small.rollouts(queued)] == [()] * 6
    assert all(row.spans == () for row in small.rollouts(slow))
    small.turn(2)
    assert small.status.running == 0
    assert len(small.generate([PROMPT], max_tokens=4, ignore_eos=True)[0].token_ids) == 4


def test_a_deadline_returns_partial_rows_or_says_it_never_started(base: Driver, qwen) -> None:  # type: ignore[no-untyped-def]
    for patience in (0.3, 1, 3, 9):  # A busy machine may take longer than the first to its first token.
        id = base.submit([PROMPT], max_tokens=1500, ignore_eos=True, deadline=time.monotonic() + patience)
        base.finish(id)
        if any(row.token_ids for row in base.rollouts(id)):
            break
    (row,) = base.rollouts(id)
    assert (row.finish_reason, row.stop_reason) == (FinishReason.ABORTED, "timeout") and row.token_ids
    small = Driver.start(qwen, base.model)
    small.set_max_rows(1)
    long = small.submit([PROMPT], max_tokens=300, ignore_eos=True)
    small.turn(2)
    late = small.submit([PROMPT], deadline=time.monotonic() + 0.05)
    small.finish(late)
    assert not small.over(long)
    small.abort(long)
    small.finish(long)
    assert isinstance(small.error(late), NeverAdmitted) and small.rollouts(late) == []


def test_prompt_logprobs_come_with_the_rows(base: Driver) -> None:
    prompts = prompts_of([25, 1, 300], 286)
    rows = base.generate(prompts, n=2, max_tokens=4, ignore_eos=True, wants=Wants(prompt_logprobs=True))
    for row, prompt in zip(rows[::2], prompts, strict=True):
        (score,) = base.score([prompt])
        assert row.prompt_logprobs is not None and row.prompt_logprobs[0] is None
        assert len(row.prompt_logprobs) == len(prompt)
        assert_near(row.prompt_logprobs[1:], score.logprobs[1:], TINY.of_logprobs(score.logprobs[1:], len(prompt)))


def test_every_token_is_streamed_once(base: Driver) -> None:
    id = base.submit([PROMPT], n=3, max_tokens=12, wants=Wants(tokens_as_they_come=True, top_logprobs=2))
    base.finish(id)
    for row in base.rollouts(id):
        pieces = [t for t in base.tokens(id) if t.sample_index == row.sample_index]
        assert tuple(token for piece in pieces for token in piece.token_ids) == row.token_ids
        assert tuple(value for piece in pieces for value in piece.logprobs) == row.logprobs


def test_the_scorer_tempers_and_starts_where_told(base: Driver) -> None:
    (row,) = base.generate([PROMPT], max_tokens=12, temperature=0.6, ignore_eos=True)
    tokens = row.prompt_ids + row.token_ids
    (score,) = base.score([tokens], [len(row.prompt_ids)], temperature=0.6)
    within = TINY.of_row(row) / 0.6
    assert_near(score.logprobs, row.sampling_logprobs, within)
    (whole,) = base.score([tokens], temperature=0.6)
    assert whole.logprobs[0] is None
    assert_near(whole.logprobs[len(row.prompt_ids) :], score.logprobs, within)
    (single,) = base.score([[7]])
    assert single.logprobs == (None,)


def test_abort_while_the_prompt_is_scored_returns_rows_and_not_errors(base: Driver) -> None:
    id = base.submit(prompts_of([1500, 10], 286), n=2, max_tokens=3, ignore_eos=True, wants=Wants(prompt_logprobs=True))
    base.until(lambda: base.status.running > 0)
    base.turn(2)
    base.abort(id)
    base.finish(id, turns=4)
    assert base.error(id) is None
    rows = base.rollouts(id)
    assert len(rows) == 4 and {row.finish_reason for row in rows} <= {FinishReason.ABORTED, FinishReason.LENGTH}
    assert base.score([PROMPT])[0].logprobs[0] is None


class Counted(tuple[Any, ...]):
    """Counts the items that are looked at."""

    looks = 0

    def __iter__(self) -> Iterator[Any]:
        for item in super().__iter__():
            self.looks += 1
            yield item

    def __contains__(self, item: object) -> bool:
        self.looks += 1 + next((at for at, other in enumerate(super().__iter__()) if other is item), len(self))
        return super().__contains__(item)


def test_ending_a_request_looks_at_each_of_its_groups_a_few_times(base: Driver) -> None:
    count = 2000
    id = base.submit([PROMPT[:2]] * count, max_tokens=3, ignore_eos=True, wants=Wants(prompt_logprobs=True))
    base.turn(20)
    open_request = base.requests.open_requests[id]
    assert open_request.waiting_groups > 1000 and len(base.rollouts(id)) > 10
    open_request.groups = Counted(open_request.groups)
    base.abort(id)
    base.finish(id, turns=2)
    assert len(base.rollouts(id)) == count and not base.score_jobs
    assert open_request.groups.looks <= 10 * count, "quadratic would be millions"


def test_a_stop_ends_everything_that_is_open_once(driver: Driver, qwen: Path) -> None:
    small = Driver.start(qwen, driver.model, max_batch=3, prefill_tokens=16)
    small.push("p", small.bundle(1))
    wants = Wants(prompt_logprobs=True)
    requests = [small.submit(prompts_of([9, 60], 286, seed=k), n=2, max_tokens=30, policy="p") for k in range(4)]
    requests.append(small.submit([PROMPT, PROMPT], max_tokens=30, wants=wants))
    small.turn(7)
    requests.append(small.submit([PROMPT], max_tokens=3, wants=wants, deadline=0.0))
    small.send(Score("score", PolicyAddress("p"), (tuple(PROMPT),), (0,)))
    small.take_commands()
    small.send(Delete("delete", "p", 1))
    push = small.publish("q", small.bundle(2))
    small.send(Stop())
    small.take_commands()
    assert small.stopping
    small.engine.stop()
    ends = Counter(event.id for event in small.events if isinstance(event, RequestDone | RequestFailed))
    assert ends == Counter([*requests, "score", "delete", push])
    done = [id for id in requests if small.error(id) is None]
    assert 0 < len(done) < len(requests), "what had tokens came back with them"
    for id in done:
        rows = small.rollouts(id)
        assert len(rows) == 4 and {row.finish_reason for row in rows} <= set(FinishReason) - {FinishReason.ERROR}
    for id in {*requests} - {*done}:
        assert isinstance(small.error(id), EngineUnavailable)


def test_end_tokens_that_the_model_cannot_produce_are_no_end_tokens(tmp_path: Path) -> None:
    """A configuration may name ids of another vocabulary; banning those would write outside of the logits."""
    path = tiny_models.build("qwen3", tmp_path / "tiny", num_hidden_layers=1)
    settings = json.loads((path / "config.json").read_text())
    own = settings["eos_token_id"]
    wrong = [own, tiny_models.VOCAB_SIZE, 151_645, -1]
    (path / "config.json").write_text(json.dumps(settings | {"eos_token_id": wrong}))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
    driver = Driver.start(path)
    assert driver.model.info.eos_token_ids == (own,)
    neighbour, held = driver.generate([PROMPT, PROMPT], max_tokens=40, min_tokens=40, seed=3)
    free = driver.generate([PROMPT, PROMPT], max_tokens=40, ignore_eos=True, seed=3)
    assert all(len(row.token_ids) == 40 and own not in row.token_ids for row in (neighbour, held))
    for one, other in zip((neighbour, held), free, strict=True):
        same = next(
            (at for at, pair in enumerate(zip(one.token_ids, other.token_ids, strict=True)) if len({*pair}) > 1), 40
        )
        assert_near(one.logprobs[:same], other.logprobs[:same], TINY.of_row(other))
