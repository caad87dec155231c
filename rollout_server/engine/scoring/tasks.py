"""What is scored for whom: a request's own sequences and their labels, rows that are drawn again, a group's prompt, and
a group's rows under the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rollout_server.engine.batch.prefix_reuse import key_of
from rollout_server.engine.batch.row import Group
from rollout_server.engine.messages.options import ModelInfo
from rollout_server.engine.messages.scoring import (
    Classified,
    Classify,
    Embed,
    Embedded,
    RecordedRow,
    Replay,
    Replayed,
    ReplayedRow,
    Score,
    Scored,
    ScoredSequence,
    ScoringCommand,
)
from rollout_server.engine.policies.held_scorers import HeldScorers
from rollout_server.engine.policies.scorers import Scorer
from rollout_server.engine.policies.table import PolicyTable
from rollout_server.engine.requests.reports import Reports
from rollout_server.engine.scoring.job import ScoredSequenceState, ScoreJob, runs_of
from rollout_server.engine.scoring.labels import LabelReading
from rollout_server.engine.scoring.queue import ScoringQueue
from rollout_server.engine.scoring.replay import RowReplay
from rollout_server.engine.sight.features import Eyes
from rollout_server.engine.sight.sight import Sight
from rollout_server.errors import InvalidField, RolloutError, UnknownPolicy
from rollout_server.rollout import BASE, PolicyAddress, PolicyVersion, Span, SpanAddress
from rollout_server.text.pictures.picture import Picture

Held = dict[PolicyAddress, tuple[PolicyVersion, Any]]
"""Versions with one reference each, and their placements."""


class ScoringTasks:
    """Makes jobs of the scoring queue and hands their results to the reports. `info` is the model's,
    and its `eyes` see pictures, where the model has a tower."""

    def __init__(
        self,
        queue: ScoringQueue,
        policies: PolicyTable,
        held: HeldScorers,
        reports: Reports,
        info: ModelInfo,
        eyes: Eyes | None = None,
    ) -> None:
        self._eyes = eyes
        self._eos = frozenset(info.eos_token_ids)
        self._pooling = info.embedding.pooling
        self._queue = queue
        self._policies = policies
        self._held = held
        self._reports = reports

    def read(self, request: ScoringCommand) -> None:
        """A request of its own. Raises `UnknownPolicy` or `VersionGone`, holding nothing."""
        match request:
            case Score():
                self.score(request)
            case Replay():
                self.replay(request)
            case Embed():
                self.embed(request)
            case Classify():
                self.classify(request)

    def classify(self, request: Classify) -> None:
        """Label scores. Raises `UnknownPolicy`, `VersionGone`, or `InvalidField` where the policy has nothing that
        gives them, holding nothing."""
        asked, owner = request.label_token_ids, ""
        sights = self._sights(request.sequences, request.pictures)
        scorer: Scorer | None
        if request.held:
            held = self._held.again(request.held)
            scorer, version, placement, owner = held.scorer, held.version, held.placement, held.owner
        else:
            scorer = None if asked else self._policies.scorer(request.policy)
            version, placement = self._policies.acquire(request.policy, 1, None, reads=not asked)
        head = scorer.head if scorer else None
        readings = [LabelReading(positions, head, asked) for positions in request.positions]

        def finished(_: tuple[ScoredSequence, ...]) -> None:
            names, activation = (scorer.labels, scorer.activation) if scorer else ((None,) * len(asked), "softmax")
            scores = tuple(reading.scores for reading in readings)
            self._reports.add(Classified(request.id, version, scores, names, activation))

        job = ScoreJob(
            request.id,
            (version,),
            finished,
            lambda error: self._reports.fail(request.id, error),
            owner=owner,
            key=key_of(version, placement) if request.shared else None,
        )
        members = list(zip(request.sequences, readings, sights, strict=True))
        job.classify(members, version, placement, request.shared)
        self._queue.add(job)

    def embed(self, embed: Embed) -> None:
        """Hidden states pooled. Raises `UnknownPolicy` or `VersionGone`, holding nothing."""
        sights = self._sights(embed.sequences, embed.pictures)
        version, placement = self._policies.acquire(embed.policy, 1, None, reads=True)

        def finished(_: tuple[ScoredSequence, ...]) -> None:
            vectors = tuple(sequence.pool.vector for sequence in job.sequences if sequence.pool is not None)
            self._reports.add(Embedded(embed.id, version, vectors))

        job = ScoreJob(embed.id, (version,), finished, lambda error: self._reports.fail(embed.id, error))
        for tokens, sight in zip(embed.sequences, sights, strict=True):
            job.embed(tokens, version, placement, self._pooling, sight)
        self._queue.add(job)

    def score(self, score: Score) -> None:
        """A request of its own. Raises `UnknownPolicy` or `VersionGone`, holding nothing."""
        held: Held = {}
        sights = self._sights(score.sequences, score.pictures)
        for sight, start in zip(sights, score.starts, strict=True):
            check_start(sight, start)
        try:
            version, _ = self._hold(held, score.policy)
            members = [self._member(score, index, held) for index in range(len(score.sequences))]
            for index, (member, sight) in enumerate(zip(members, sights, strict=True)):
                check_borders(sight, *member[1:], f"sequences[{index}]")
        except RolloutError:
            self._let_go(held)
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
        for member, sight in zip(members, sights, strict=True):
            job.add([member], sight=sight)
        self._queue.add(job)

    def _sights(
        self, sequences: Sequence[tuple[int, ...]], pictures: Sequence[tuple[Picture, ...]]
    ) -> list[Sight | None]:
        """Where the pictures of each sequence stand. Raises `InvalidField` where they do not fit its placeholders."""
        if self._eyes is None or not pictures:
            return [None] * len(sequences)
        return [self._eyes.sight(tokens, shown) for tokens, shown in zip(sequences, pictures, strict=True)]

    def _hold(self, held: Held, address: PolicyAddress) -> tuple[PolicyVersion, Any]:
        if address not in held:
            held[address] = self._policies.acquire(address, 1, None)
        return held[address]

    def _member(self, score: Score, index: int, held: Held) -> tuple[tuple[int, ...], int, list[tuple[Span, Any]]]:
        tokens, start = score.sequences[index], score.starts[index]
        given = score.spans[index] if score.spans else None
        if given is None:
            version, placement = self._hold(held, score.policy)
            return tokens, start, [(Span(version, 0, len(tokens) - start), placement)]
        return tokens, start, self._spans(held, given, f"sequences[{index}]", by_digest=score.by_digest)

    def _spans(
        self, held: Held, given: Sequence[SpanAddress], place: str, *, by_digest: bool
    ) -> list[tuple[Span, Any]]:
        """Spans with their placements. `by_digest`: any kept version of that content will do, whatever its number."""
        spans = []
        for at, span in enumerate(given):
            where = f"{place}.versions[{at}]"
            try:
                version, placement = self._find(held, span) if by_digest else self._hold(held, span.address)
            except RolloutError as error:
                error.param = where
                raise
            if span.digest is not None and span.digest != version.digest:
                raise UnknownPolicy(
                    f"{span.address} has the digest {version.digest} here, not {span.digest}.", param=where
                )
            spans.append((Span(version, span.start, span.end, span.kv), placement))
        return spans

    def _find(self, held: Held, span: SpanAddress) -> tuple[PolicyVersion, Any]:
        """By digest, which means the same everywhere; by number where none is known that had it."""
        if span.digest is None:
            return self._hold(held, span.address)
        try:
            return self._hold(held, PolicyAddress(span.address.name, digest=span.digest))
        except UnknownPolicy:
            return self._hold(held, span.address)

    def replay(self, replay: Replay) -> None:
        """Rows drawn again. Raises `UnknownPolicy` or `VersionGone`, holding nothing."""
        held: Held = {}
        sequences = [row.prompt_ids + row.token_ids for row in replay.rows]
        sights = self._sights(sequences, [row.pictures for row in replay.rows])
        try:
            members = [
                self._replayed(held, index, row, sight)
                for index, (row, sight) in enumerate(zip(replay.rows, sights, strict=True))
            ]
        except RolloutError:
            self._let_go(held)
            raise

        def finished(sequences: tuple[ScoredSequence, ...]) -> None:
            rows = zip(replay.rows, job.sequences, sequences, strict=True)
            self._reports.add(Replayed(replay.id, tuple(_compared(*row) for row in rows)))

        job = ScoreJob(
            replay.id,
            tuple(taken for taken, _ in held.values()),
            finished,
            lambda error: self._reports.fail(replay.id, error),
        )
        for row, member, sight in zip(replay.rows, members, sights, strict=True):
            job.add([member], sight=sight)
            job.sequences[-1].replay = RowReplay(
                row.prompt_ids, row.token_ids, row.judged, row.sampling, row.seed, self._eos
            )
        self._queue.add(job)

    def _replayed(
        self, held: Held, index: int, row: RecordedRow, sight: Sight | None
    ) -> tuple[tuple[int, ...], int, list[tuple[Span, Any]]]:
        """A recorded row, the first position of it that gives a value, and its spans, which count from there."""
        place = f"rollouts[{index}]"
        spans = self._spans(held, row.spans, place, by_digest=True)
        first = len(row.prompt_ids) - 1
        # What was given of a picture that begins in the prompt has no values where it is read in one chunk.
        given = 0 if sight is None else sight.chunk(0, first) - first
        if given and spans and spans[0][0].end > given and not any(row.judged[:given]):
            spans = [(replace(span, start=max(0, span.start - given), end=span.end - given), at) for span, at in spans]
        else:
            given = 0
        start = len(row.prompt_ids) + given
        check_borders(sight, start, spans, place)
        return row.prompt_ids + row.token_ids, start, spans

    def _let_go(self, held: Held) -> None:
        for taken, _ in held.values():
            self._policies.release(taken, 1)

    def score_prompt(self, group: Group, version: PolicyVersion) -> None:
        """The log-probabilities of a group's prompt under its version; its rows wait for them."""
        group.unscored = True
        self._policies.acquire_again(version, 1)
        count, sight = len(group.request.prompt_ids), group.sight
        # A picture that begins in the prompt, and is read in one chunk, is read to its end.
        inputs = count - 1 if sight is None else sight.chunk(0, count - 1)
        tokens = group.request.given_ids[: inputs + 1]
        job = ScoreJob(
            group.request.id,
            (version,),
            lambda sequences: self._reports.prompt_scored(group, sequences[0].logprobs[:count]),
            lambda error: self._reports.fail_group(group, error),
            group=group,
        )
        job.add([(tokens, 0, [(Span(version, 0, len(tokens)), group.placement)])], sight=sight)
        self._queue.add(job)

    def score_rows(self, group: Group) -> None:
        """The log-probabilities of the tokens of a group's held rows under the base, their prompt read once."""
        rows = [row for row in group.withheld if row.needs_reference]
        base, placement = self._policies.acquire(PolicyAddress(BASE), 1, None)

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
            [(prompt + tuple(row.token_ids), given, [(Span(base, 0, row.sampled), placement)]) for row in rows],
            shared=given - 1,
            sight=group.sight,
        )
        self._queue.add(job)


def check_start(sight: Sight | None, start: int) -> None:
    """Raises `InvalidField` where values would begin within a picture that is read in one chunk."""
    first = max(start, 1) - 1
    if sight is not None and sight.before(first) != first:
        raise InvalidField(
            f"start is {start}, which lies within a picture whose tokens see each other: let it be at most "
            f"{sight.before(first) + 1}, or behind the picture.",
            param="sequences",
        )


def check_borders(sight: Sight | None, start: int, spans: Sequence[tuple[Span, Any]], place: str) -> None:
    """Raises `InvalidField` where a picture that is read in one chunk would be read under two versions, or is not
    followed by what its last token predicts."""
    if sight is None:
        return
    for border in (border for run in runs_of(start, spans) for border in (run.scored, run.end)):
        if (before := sight.before(border)) != border:
            raise InvalidField(
                f"{place} changes its version or ends in front of its token {border + 1}, within a picture whose "
                f"tokens see each other: let it do so in front of token {before + 1}, or behind the token that follows "
                "the picture.",
                param=place,
            )


def _compared(row: RecordedRow, sequence: ScoredSequenceState, scored: ScoredSequence) -> ReplayedRow:
    """What became of a row that was read again; only judged tokens count."""
    # Given tokens at its beginning may have no values, see `ScoringTasks._replayed`.
    missing = (None,) * (len(row.judged) - len(scored.logprobs))
    known = zip(row.judged, row.logprobs, missing + scored.logprobs, strict=bool(row.spans))
    gaps = [abs(old - new) for judged, old, new in known if judged and old is not None and new is not None]
    drawn = sequence.replay
    return ReplayedRow(
        drawn.difference if drawn else None, drawn.margin if drawn else None, max(gaps) if gaps else None
    )
