"""What is scored for whom: a request's own sequences, a group's prompt, and a group's rows under the base."""

from __future__ import annotations

from typing import Any

from rollout_server.engine.messages import Score, Scored, ScoredSequence
from rollout_server.engine.passages import ScoreJob
from rollout_server.engine.policy import PolicyTable
from rollout_server.engine.reports import Reports
from rollout_server.engine.scoring_queue import ScoringQueue
from rollout_server.engine.sequence import Group
from rollout_server.errors import RolloutError, UnknownPolicy
from rollout_server.rollout import BASE, PolicyAddress, PolicyVersion, Span

Held = dict[PolicyAddress, tuple[PolicyVersion, Any]]
"""Versions with one reference each, and their slots."""


class References:
    """Makes jobs of the scoring queue and hands their results to the reports."""

    def __init__(self, queue: ScoringQueue, policies: PolicyTable, reports: Reports) -> None:
        self._queue = queue
        self._policies = policies
        self._reports = reports

    def score(self, score: Score) -> None:
        """A request of its own. Raises `UnknownPolicy` or `VersionGone`, holding nothing."""
        held: Held = {}
        try:
            version, _ = self._hold(held, score.policy)
            members = [self._member(score, index, held) for index in range(len(score.sequences))]
        except RolloutError:
            for taken, _ in held.values():
                self._policies.release(taken, 1)
            raise

        def finished(sequences: tuple[ScoredSequence, ...]) -> None:
            self._reports.add(Scored(score.id, version, score.temperature, sequences))

        job = ScoreJob(
            score.id,
            tuple(taken for taken, _ in held.values()),
            finished,
            lambda error: self._reports.fail(score.id, error),
            score.temperature,
            score.entropy,
            score.top_logprobs,
        )
        for member in members:
            job.add([member])
        self._queue.add(job)

    def _hold(self, held: Held, address: PolicyAddress) -> tuple[PolicyVersion, Any]:
        if address not in held:
            held[address] = self._policies.acquire(address, 1, None)
        return held[address]

    def _member(self, score: Score, index: int, held: Held) -> tuple[tuple[int, ...], int, list[tuple[Span, Any]]]:
        tokens, start = score.sequences[index], score.starts[index]
        given = score.spans[index] if score.spans else None
        if given is None:
            version, slot = self._hold(held, score.policy)
            return tokens, start, [(Span(version, 0, len(tokens) - start), slot)]
        spans = []
        for at, span in enumerate(given):
            place = f"sequences[{index}].versions[{at}]"
            try:
                version, slot = self._hold(held, span.address)
            except RolloutError as error:
                error.param = place
                raise
            if span.digest is not None and span.digest != version.digest:
                raise UnknownPolicy(
                    f"{place}: {span.address} has the digest {version.digest} here, not {span.digest}.", param=place
                )
            spans.append((Span(version, span.start, span.end, span.kv), slot))
        return tokens, start, spans

    def score_prompt(self, group: Group, version: PolicyVersion) -> None:
        """The log-probabilities of a group's prompt under its version; its rows wait for them."""
        group.unscored = True
        self._policies.acquire_again(version, 1)
        prompt = group.request.prompt_ids
        job = ScoreJob(
            group.request.id,
            (version,),
            lambda sequences: self._reports.prompt_scored(group, sequences[0].logprobs),
            lambda error: self._reports.fail_group(group, error),
            group=group,
        )
        job.add([(prompt, 0, [(Span(version, 0, len(prompt)), group.placement)])])
        self._queue.add(job)

    def score_rows(self, group: Group) -> None:
        """The log-probabilities of the tokens of a group's held rows under the base, their prompt read once."""
        rows = [row for row in group.held if row.needs_reference]
        base, slot = self._policies.acquire(PolicyAddress(BASE), 1, None)

        def finished(sequences: tuple[ScoredSequence, ...]) -> None:
            for row, sequence in zip(rows, sequences, strict=True):
                row.base_logprobs = prefix.missing + tuple(v for v in sequence.logprobs if v is not None)
            self._reports.referred(group)

        prompt, prefix = group.request.prompt_ids, group.request.prefix
        given = len(prompt) + len(prefix)
        job = ScoreJob(
            group.request.id,
            (base,),
            finished,
            lambda error: self._reports.fail_group(group, error),
            group=group,
        )
        job.add(
            [(prompt + tuple(row.token_ids), given, [(Span(base, 0, row.sampled), slot)]) for row in rows],
            shared=given - 1,
        )
        self._queue.add(job)
