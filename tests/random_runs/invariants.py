"""What the engine promises of versions, rows and requests, checked from outside after every turn.

`Promises` follows the events as a client would, keeps its own account of what must be there, and compares: references
with those who hold them, slots with versions, rows with what was asked for, and every finished row's log-probabilities
with plain forwards of models into which the adapters were merged by hand.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from rollout_server.engine.messages.rollouts import Event, RequestDone, RequestFailed, RowFinished
from rollout_server.engine.messages.scoring import Score, Scored
from rollout_server.engine.messages.versions import Deleted, Exported, Pinned, Published, Restored
from rollout_server.errors import EngineFault, NeverAdmitted
from rollout_server.rollout import FinishReason, OnUpdate, PolicyVersion, Rollout, RolloutRequest
from tests.random_runs.expected_versions import REFUSALS, Kept, Line
from tests.support.engine.driver import Driver
from tests.support.numbers.bounds import TINY, assert_near

Key = tuple[str, int]
"""Name and number of a version."""


@dataclass
class Asked:
    """A request and what became of it."""

    groups: tuple[RolloutRequest, ...]
    ended: set[str] = field(default_factory=set)
    """Why it may have ended early: `abort`, `timeout`, `fault`."""
    started: dict[int, PolicyVersion] = field(default_factory=dict)
    """By prompt, the version that its KV was computed under."""
    rows: dict[tuple[int, int], Rollout] = field(default_factory=dict)
    over: bool = False


@dataclass
class Promises:
    driver: Driver
    oracle: Callable[[str], nn.Module]
    """The model that a digest means, merged by hand."""
    keep: int
    lines: dict[str, Line] = field(default_factory=dict)
    asked: dict[str, Asked] = field(default_factory=dict)
    commands: dict[str, Any] = field(default_factory=dict)
    """By id, those that have no answer yet."""
    struck: set[str] = field(default_factory=set)
    """Ids of changes in whose middle the test made something fail."""
    alive: dict[str, set[int | None]] = field(default_factory=dict)
    """By id of a scoring, what was live while it waited."""
    read: int = 0
    checked: Counter[str] = field(default_factory=Counter)

    def check(self) -> None:
        """After a turn."""
        for id, command in self.commands.items():
            if isinstance(command, Score) and command.policy.follows:
                self.alive.setdefault(id, set()).add(self.lines.get(command.policy.name, Line()).live)
        for line in self.lines.values():
            line.this_turn = set(line.kept)
        events, self.read = self.driver.events[self.read :], len(self.driver.events)
        for event in events:
            self._follow_event(event)
        held = holders(self.driver)
        self._check_versions(held)
        self._check_slots()
        self._check_rows()

    # ---- events -----------------------------------------------------------------------------------------------------

    def _follow_event(self, event: Event) -> None:
        self.checked[type(event).__name__] += 1
        match event:
            case RowFinished(id, rollout):
                self._row(self.asked[id], rollout)
            case RequestDone(id):
                asked = self.asked[id]
                assert not asked.over, f"{id} ended twice"
                asked.over = True
                assert len(asked.rows) == sum(group.n for group in asked.groups), f"{id} ended with rows missing"
            case RequestFailed(id, error) if id in self.asked:
                asked = self.asked[id]
                assert not asked.over, f"{id} ended twice"
                asked.over = True
                allowed = (*REFUSALS, *((NeverAdmitted,) if "timeout" in asked.ended else ()))
                assert isinstance(error, (*allowed, EngineFault) if "fault" in asked.ended else allowed), repr(error)
                assert not any(row.token_ids for row in asked.rows.values())
            case RequestFailed(id, error):
                command = self.commands.pop(id)
                self._line(command).refused(command, error, (EngineFault,) if id in self.struck else ())
            case Scored():
                self._score(event, self.commands.pop(event.id))
            case Published() | Pinned() | Deleted() | Exported() | Restored():
                command = self.commands.pop(event.id)
                self._line(command).changed(command, event)

    def _line(self, command: Any) -> Line:
        return self.lines.setdefault(getattr(command, "name", None) or command.policy.name, Line())

    # ---- state ------------------------------------------------------------------------------------------------------

    def _check_versions(self, held: Counter[Key]) -> None:
        """References are exactly those that someone holds; what should be kept is, and nothing else."""
        shown = {policy.name: policy for policy in self.driver.status.policies}
        counted: Counter[Key] = Counter()
        for name, actual in self.driver.lines.items():
            line = self.lines[name]
            counted.update({(name, v.number): v.in_use for v in (*actual.kept.values(), *actual.leaving.values())})
            assert all(version.in_use > 0 for version in actual.leaving.values())
            assert (actual.live, actual.last) == (line.live, line.last)
            assert actual.kept.keys() <= line.kept.keys()
            for number in line.kept.keys() - actual.kept.keys():
                newer = [other for other in line.this_turn - {line.provisional} if other > number]
                assert number != line.live and number not in line.pinned and len(newer) >= self.keep, f"{name}@{number}"
            found = {n: Kept(v.digest, v.facts.mode, v.label) for n, v in actual.kept.items()}
            line.kept = {number: kept for number, kept in line.kept.items() if number in found}
            assert line.kept == found, "a version is another than was published"
            for number in sorted(line.kept.keys() - {line.provisional})[: -self.keep]:
                assert number == line.live or number in line.pinned or actual.kept[number].in_use, "kept for nothing"
            assert {n for n, version in actual.kept.items() if version.pinned} == line.pinned
            told = shown[name].versions if name in shown else ()
            assert [(v.version.number, v.rows_in_use, v.live, v.pinned) for v in told] == [
                (n, v.in_use, n == line.live, n in line.pinned) for n, v in actual.kept.items()
            ], "the status shows something else"
        assert min(counted.values(), default=0) >= 0
        assert +counted == held, f"counted {+counted}, held {held}"

    def _check_slots(self) -> None:
        """Slots are those of the digests that versions have, and each is counted as often as versions have it."""
        lines = self.driver.lines.values()
        kept = [v for line in lines for held in (line.kept, line.leaving) for v in held.values()]
        wanted = Counter((v.digest, v.facts.mode) for v in kept)
        residents = self.driver.residents
        assert Counter({tuple(content): resident.references for content, resident in residents.items()}) == wanted
        assert len({resident.placement for resident in residents.values()}) == len(residents)
        assert Counter(self.driver.bundles_held) == Counter(v.digest for v in kept)

    def _check_rows(self) -> None:
        batch = self.driver.batches
        assert batch.size <= self.driver.model.info.max_batch
        for id, open_request in self.driver.requests.open_requests.items():
            for group in open_request.groups:
                if group.version is not None and group.request.prompt_index not in self.asked[id].started:
                    self._started(self.asked[id], group.request, group.version)
        for row in batch.rows:
            assert len(row.token_ids) == len(row.logprobs) == len(row.sampling_logprobs)
            assert 0 <= row.dispatched - len(row.token_ids) <= 1 or not row.running
            tiles(row.spans, row.dispatched)
            if row.running and not row.evicted:
                self._follows(row.group.request, row.version, row.group.version)

    def _started(self, asked: Asked, request: RolloutRequest, version: PolicyVersion) -> None:
        """A group starts on what its policy means in the turn of its admission."""
        asked.started[request.prompt_index] = version
        address, line = request.policy, self.lines.get(version.name, Line())
        assert version.name == address.name
        if address.follows:
            assert version.number == line.live
        assert address.number in (None, version.number) and version.digest.startswith(address.digest or "")
        assert (line.live or 0) >= (request.min_version or 0), "min_version is of the alias"

    def _follows(self, request: RolloutRequest, now: PolicyVersion, first: PolicyVersion | None) -> None:
        live = self.lines[now.name].live if request.policy.follows else None
        if live is None or request.on_update is OnUpdate.FINISH:
            assert request.on_update is OnUpdate.SWITCH or now == first
            stale = None if live is None or request.max_staleness is None else live - now.number
            assert stale is None or stale <= (request.max_staleness or 0)
        else:
            assert now.number == live

    # ---- results ----------------------------------------------------------------------------------------------------

    def _row(self, asked: Asked, row: Rollout) -> None:
        assert not asked.over, "a row after the end of its request"
        assert (row.prompt_index, row.sample_index) not in asked.rows, "a row twice"
        asked.rows[row.prompt_index, row.sample_index] = row
        request = asked.groups[row.prompt_index]
        count = len(row.token_ids)
        assert count == len(row.logprobs) == len(row.sampling_logprobs) <= request.sampling.max_tokens
        tiles(row.spans, count)
        match row.finish_reason:
            case FinishReason.LENGTH:
                assert count == request.sampling.max_tokens
            case FinishReason.STOP:
                assert row.token_ids[-1] in self.driver.model.info.eos_token_ids
            case FinishReason.SUPERSEDED:
                assert request.policy.follows
                assert request.on_update is OnUpdate.ABORT or request.max_staleness is not None
            case FinishReason.ABORTED:
                assert asked.ended & {"abort", "timeout"}
            case FinishReason.ERROR:
                refused = row.error is not None and row.error.code in {cls.code for cls in REFUSALS}
                assert "fault" in asked.ended or refused, row.error
        if count:
            self._check_logprobs(request, row, asked.started[row.prompt_index])
        if row.prompt_logprobs is not None:
            expected = self.logprobs(row.prompt_ids, [(asked.started[row.prompt_index].digest, 1, len(row.prompt_ids))])
            assert_near(row.prompt_logprobs[1:], expected, TINY.of_logprobs(expected, len(row.prompt_ids)))

    def _check_logprobs(self, request: RolloutRequest, row: Rollout, first: PolicyVersion) -> None:
        """Every token under the version it is stamped with, on the KV that is said to have been read."""
        at = len(row.prompt_ids)
        # A row that switched before its first token has read its prompt again.
        assert row.spans[0].version == first or request.on_update is OnUpdate.SWITCH
        first = row.spans[0].version
        for span in row.spans:
            assert span.kv == (None if span is row.spans[0] else "carried")
        spans = [(span.version.digest, at + span.start, at + span.end) for span in row.spans]
        expected = self.logprobs(row.prompt_ids + row.token_ids, spans, prompt=(first.digest, at - 1))
        assert_near(row.logprobs, expected, TINY.of_row(row))
        self.checked["tokens"] += len(row.token_ids)

    def _score(self, event: Scored, command: Any) -> None:
        if command.policy.follows:
            assert event.version.number in self.alive[event.id]
        for tokens, scored in zip(command.sequences, event.sequences, strict=True):
            expected = self.logprobs(tokens, [(event.version.digest, 1, len(tokens))])
            assert_near(scored.logprobs[1:], expected, TINY.of_logprobs(expected, len(tokens)))

    def logprobs(
        self, tokens: tuple[int, ...], spans: list[tuple[str, int, int]], prompt: tuple[str, int] | None = None
    ) -> np.ndarray:
        """Of the tokens at `start` to `end` under the version of each span, one forward for each; `prompt` is the
        version under which the first tokens were read, and how many."""
        caches = make_prompt_cache(self.driver.model.module)
        if prompt is not None and prompt[1]:
            self.oracle(prompt[0])(mx.array([tokens[: prompt[1]]]), cache=caches)
        found = [np.zeros(0)]
        for digest, start, end in spans:
            if end > start:
                out = self.oracle(digest)(mx.array([tokens[start - 1 : end - 1]]), cache=caches)[0].astype(mx.float32)
                chosen = mx.take_along_axis(out, mx.array(tokens[start:end])[:, None], axis=-1)[:, 0]
                found.append(np.array(chosen - mx.logsumexp(out, axis=-1)))
        return np.concatenate(found)


def tiles(spans: Any, count: int) -> None:
    """They follow on each other from 0 to `count`, and neighbours differ."""
    ends = [0, *(span.end for span in spans)]
    assert [span.start for span in spans] == ends[:-1] and ends[-1] == count
    assert all(span.end > span.start for span in spans)
    assert all(one.version != other.version for one, other in itertools.pairwise(spans))


def holders(driver: Driver) -> Counter[Key]:
    """Who holds each version: rows in the batch, samples whose prompt is read, samples that wait for a place, jobs."""
    groups = {
        id(group): group for open_request in driver.requests.open_requests.values() for group in open_request.groups
    }
    groups |= {id(row.group): row.group for row in driver.batches.rows}
    groups |= {id(joining.group): joining.group for joining in driver.batches.joining}
    held: Counter[Key] = Counter()
    for version, count in (
        *((row.version, 1) for row in driver.batches.rows),
        *((joining.group.version, joining.count) for joining in driver.batches.joining),
        *((group.version, group.waiting) for group in groups.values()),
        *((version, 1) for job in driver.score_jobs for version in job.versions),
    ):
        if version is not None and version.number and count:
            held[version.name, version.number] += count
    return held
