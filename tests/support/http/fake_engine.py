"""EngineHandle's surface over a script instead of a model: what the HTTP room is tested against.

A row's tokens come from `script`; log-probabilities are functions of the token, so that tests can tell them apart.
Real messages, real policy versions, no thread and no arrays.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rollout_server.engine.messages.control import PrefixCacheReset, Released, RowSeen, RowsSeen
from rollout_server.engine.messages.options import Embedding, ModelInfo, Task
from rollout_server.engine.messages.rollouts import RowFinished, TokensSampled
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
)
from rollout_server.engine.messages.status import EngineStatus, MemoryStatus, PictureStatus, PrefixStatus, TokenGaps
from rollout_server.errors import Conflict, EngineUnavailable, RolloutError, StalePolicy
from rollout_server.grammar import Constraint, Grammar
from rollout_server.rollout import (
    FinishReason,
    PolicyAddress,
    PolicyVersion,
    Rollout,
    RolloutRequest,
    RowError,
    Span,
    SpanAddress,
    Timings,
)
from rollout_server.text.pictures.reader import PictureReader
from tests.support.http.fake_versions import BASE_DIGEST, FakeVersions

CONTEXT = 512
VOCABULARY = 400
EMBEDDING = Embedding("last", True, 4, "")
LAYERS = {"model.layers.0.self_attn.q_proj": (6, 4), "model.layers.0.mlp.down_proj": (4, 10)}


@dataclass(frozen=True)
class Row:
    """What the script says of one row."""

    token_ids: Sequence[int]
    finish_reason: FinishReason = FinishReason.LENGTH
    stop_reason: str | int | None = None
    error: RolloutError | None = None
    hangs: bool = False
    """Never ends by itself."""
    cached_tokens: int = 0


Script = Callable[[RolloutRequest, int], Row]


def logprob(token: int) -> float:
    return -0.001 * token - 0.25


def sampling_logprob(token: int) -> float:
    return -0.002 * token - 0.125


def pooled(ids: Sequence[int]) -> list[float]:
    """A vector of `EMBEDDING.width`."""
    return [float(len(ids)), float(ids[-1]), 2.0, -1.0]


def head_scores(token: int, labels: int) -> list[float]:
    """What a head with so many labels gives at a token."""
    return [0.01 * token / (label + 1) for label in range(labels)]


def base_logprob(token: int) -> float:
    return -0.003 * token - 0.5


def top_of(token: int, count: int) -> tuple[tuple[int, float], ...]:
    """The token and the ids after it."""
    return tuple((token + at, logprob(token) - at) for at in range(count))


def plain(request: RolloutRequest, sample: int) -> Row:
    """Three letters that depend on prompt and sample."""
    return Row([(sum(request.prompt_ids) + sample + at) % 26 + 60 for at in range(3)])


class FakeSubscription:
    def __init__(self, id: str, engine: FakeEngine, groups: Sequence[RolloutRequest]) -> None:
        self.id = id
        self.reasons: list[str] = []
        self._aborted = asyncio.Event()
        self._engine = engine
        self._events = self._run(groups)
        self._over = False

    def __aiter__(self) -> AsyncIterator[TokensSampled | RowFinished]:
        return self

    async def __anext__(self) -> TokensSampled | RowFinished:
        try:
            return await anext(self._events)
        except (StopAsyncIteration, RolloutError):
            self._over = True
            self._engine.open.pop(self.id, None)
            raise

    def abort(self, reason: str = "disconnect") -> None:
        if not self._over:
            self.reasons.append(reason)
            self._engine.aborted.append((self.id, reason))
            self._aborted.set()

    async def _run(self, groups: Sequence[RolloutRequest]) -> AsyncIterator[TokensSampled | RowFinished]:
        if self._engine.fault is not None:
            raise self._engine.fault
        produced, error = False, None
        for group in groups:
            version = self._engine.resolve(group)
            for sample in range(group.n):
                row = self._engine.script(group, sample)
                if group.wants.tokens_as_they_come:
                    for id in row.token_ids:
                        await asyncio.sleep(0)
                        yield _token(group, sample, version, id)
                if row.hangs:
                    await asyncio.wait({asyncio.ensure_future(self._aborted.wait())})
                    if self._engine.closing is not None:
                        raise self._engine.closing
                    row = Row(row.token_ids, FinishReason.ABORTED, self.reasons[-1])
                produced, error = produced or bool(row.token_ids), error or row.error
                yield RowFinished(group.id, _rollout(group, sample, version, row))
        if error is not None and not produced:
            raise error


def _token(group: RolloutRequest, sample: int, version: PolicyVersion, id: int) -> TokensSampled:
    top = (top_of(id, group.wants.top_logprobs),) if group.wants.top_logprobs else None
    return TokensSampled(
        group.id, group.prompt_index, sample, version, (id,), (logprob(id),), (sampling_logprob(id),), top
    )


def _rollout(group: RolloutRequest, sample: int, version: PolicyVersion, row: Row) -> Rollout:
    ids = tuple(row.token_ids)
    wants, prefix, at = group.wants, group.prefix, len(group.prefix)
    greedy = group.sampling.temperature == 0
    return Rollout(
        prompt_index=group.prompt_index,
        sample_index=sample,
        prompt_ids=group.prompt_ids,
        token_ids=prefix.token_ids + ids,
        logprobs=prefix.logprobs + tuple(logprob(id) for id in ids),
        sampling_logprobs=prefix.sampling_logprobs + tuple(sampling_logprob(id) for id in ids),
        log_kept_mass=prefix.missing + tuple(float("nan") if greedy else 0.0 for _ in ids),
        spans=(Span(version, at, at + len(ids), "recomputed" if at else None),) if ids else (),
        finish_reason=FinishReason.ERROR if row.error else row.finish_reason,
        stop_reason=row.stop_reason,
        seed=group.seeds[sample],
        sampling=group.sampling,
        timings=Timings(1.0, 2.0, 3.0, 4.0 if ids else None),
        entropy=prefix.missing + tuple(0.5 for _ in ids) if wants.entropy else None,
        top_logprobs=(None,) * at + tuple(top_of(id, wants.top_logprobs) for id in ids) if wants.top_logprobs else None,
        prompt_logprobs=(None, *map(logprob, group.prompt_ids[1:])) if wants.prompt_logprobs else None,
        base_logprobs=prefix.missing + tuple(map(base_logprob, ids)) if wants.base_logprobs else None,
        error=RowError(row.error.code, row.error.message) if row.error else None,
        cached_tokens=row.cached_tokens,
        prefix=prefix,
    )


class FakeEngine(FakeVersions):
    pictures: PictureReader | None = None

    def __init__(self, tokenizer: Any, script: Script = plain, keep_versions: int = 8) -> None:
        super().__init__(keep_versions)
        self.script = script
        self.fault: RolloutError | None = None
        """Raised by every request, submitted or scored."""
        self.refusal: RolloutError | None = None
        """Raised by submit itself."""
        self.state, self.answers = "ready", True
        self.closing: RolloutError | None = None
        self.submitted: list[tuple[str, tuple[RolloutRequest, ...], float | None]] = []
        self.scored: list[Score] = []
        self.embeds: list[Embed] = []
        self.embedding = EMBEDDING
        self.classified: list[Classify] = []
        self.task: Task = "generate"
        self.replayed: list[RecordedRow] = []
        self.aborted: list[tuple[str, str]] = []
        self.open: dict[str, FakeSubscription] = {}
        self.life: list[str] = []
        self.paused: str | None = None
        self.drained: list[bool] = []
        self.seen: list[RowSeen] = []
        self._tokenizer = tokenizer
        self._count = 0

    # ---- life -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        asyncio.get_running_loop()
        self.life.append("started")

    async def wait_ready(self) -> None:
        if self.state != "ready":
            raise EngineUnavailable("The model cannot be loaded.")

    async def close(self) -> None:
        self.life.append("closed")
        self.closing = EngineUnavailable("The server is stopping.")
        for subscription in list(self.open.values()):
            subscription.abort("stop")

    @property
    def status(self) -> EngineStatus:
        return EngineStatus(
            self.state,
            None if self.state == "ready" else "The engine ended: a test.",
            waiting=len(self.open),
            waiting_rows=5,
            running=2,
            policies=self.snapshot(),
            steps=3,
            tokens=4,
            gaps=TokenGaps((0, 3, *[0] * 9, 1, 0, 0), 1.253),
            preempted=3,
            preemptions=4,
            prefix=PrefixStatus(True, 5, 6, 700, 800, 9),
            paused=self.paused,
            memory=MemoryStatus(weights=4000, kv_limit=1024, kv_held=512, kv_filled=256, kv_pictures=64, peak=9000),
            pictures=PictureStatus(kept=2, read=11, hits=12),
        )

    async def ping(self, timeout_s: float) -> bool:
        return self.answers

    @property
    def info(self) -> ModelInfo:
        if self.state == "starting":
            raise EngineUnavailable("The model is still loading; try again in a moment.")
        return ModelInfo(
            id="org/tiny",
            digest=BASE_DIGEST,
            model_type="qwen3",
            vocab_size=VOCABULARY,
            max_model_len=CONTEXT,
            dtype="float32",
            quantization=None,
            eos_token_ids=(self._tokenizer.eos_token_id,),
            parameters=1000,
            layers=LAYERS,
            kv_bytes_per_token=16,
            kv_memory=2**20,
            cache="slots",
            max_batch=64,
            device="cpu",
            embedding=self.embedding,
            task=self.task,
            labels=self.labels,
            pad_token_id=self._tokenizer.pad_token_id,
        )

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    def compile(self, grammar: Grammar, param: str) -> Constraint:
        """As the real one does, with the same library, which is imported late: it brings transformers."""
        from rollout_server.engine.sampling.grammars import Grammars

        return Grammars(self._tokenizer, VOCABULARY, self.info.eos_token_ids).compile(grammar, param)

    def new_id(self, kind: str) -> str:
        self._count += 1
        return f"/{kind}/{self._count}"

    # ---- verbs ----------------------------------------------------------------------------------------------------

    def submit(
        self, id: str, groups: Sequence[RolloutRequest], *, deadline: float | None = None, scorer: Any = None
    ) -> FakeSubscription:
        if self.refusal is not None:
            raise self.refusal
        if id in self.open:
            raise Conflict(f"A request with id {id!r} is still open.", param="id")
        self.submitted.append((id, tuple(groups), deadline))
        self.open[id] = FakeSubscription(id, self, groups)
        return self.open[id]

    async def score(self, score: Score) -> Scored:
        self.scored.append(score)
        if self.fault is not None:
            raise self.fault
        sequences = []
        given = score.spans or (None,) * len(score.sequences)
        for ids, start, spans in zip(score.sequences, score.starts, given, strict=True):
            values = [None if at == 0 else logprob(id) for at, id in enumerate(ids)][start:]
            entropy = [None if value is None else 0.5 for value in values] if score.entropy else None
            known, most = zip(ids[start:], values, strict=True), score.top_logprobs
            tops = [None if value is None else top_of(id, most) for id, value in known]
            sequences.append(
                ScoredSequence(
                    tuple(values),
                    tuple(entropy) if entropy else None,
                    tuple(tops) if score.top_logprobs else None,
                    self._read_under(score, len(values), spans),
                )
            )
        return Scored(score.id, self._found(score.policy), score.temperature, tuple(sequences))

    async def embed(self, embed: Embed) -> Embedded:
        self.embeds.append(embed)
        if self.fault is not None:
            raise self.fault
        vectors = (np.array(pooled(ids), "<f4").tobytes() for ids in embed.sequences)
        return Embedded(embed.id, self._found(embed.policy), tuple(vectors))

    async def classify(self, classify: Classify) -> Classified:
        """Label j of a position scores its token, divided by j + 1; of tokens, their own log-probability."""
        self.classified.append(classify)
        if self.fault is not None:
            raise self.fault
        version, asked, labels = self._found(classify.policy), classify.label_token_ids, self.labels
        rows = []
        for ids, positions in zip(classify.sequences, classify.positions, strict=True):
            scores = [[logprob(token) for token in asked] or head_scores(ids[at], len(labels)) for at in positions]
            rows.append(np.array(scores, "<f4").tobytes())
        names = (None,) * len(asked) if asked else labels
        return Classified(classify.id, version, tuple(rows), names, "softmax" if len(names) > 1 else "sigmoid")

    async def replay(self, replay: Replay) -> Replayed:
        """A row differs at its second token where it has one."""
        self.replayed += replay.rows
        if self.fault is not None:
            raise self.fault
        for row in replay.rows:
            for span in row.spans:
                self._found(span.address)
        same, other = ReplayedRow(None, None, None), ReplayedRow(1, 0.25, 0.5)
        return Replayed(replay.id, tuple(other if len(row.token_ids) > 1 else same for row in replay.rows))

    def _found(self, address: PolicyAddress) -> PolicyVersion:
        return self.find(address.name, address.number, address.digest)

    def _read_under(self, score: Score, count: int, spans: tuple[SpanAddress, ...] | None) -> tuple[Span, ...]:
        if spans is None:
            return (Span(self._found(score.policy), 0, count),)
        return tuple(Span(self._found(span.address), span.start, span.end, span.kv) for span in spans)

    async def rows(self) -> RowsSeen:
        if not self.answers:
            await asyncio.Event().wait()
        counts = tuple(Counter(row.version for row in self.seen).items())
        return RowsSeen("rows", tuple(self.seen[:3]), len(self.seen), counts)

    async def reset_prefix_cache(self) -> PrefixCacheReset:
        if self.fault is not None:
            raise self.fault
        return PrefixCacheReset(self.new_id("prefixes"), 4096)

    async def release(self) -> Released:
        return Released(self.new_id("release"), 3072, 1024)

    def abort(self, ids: Sequence[str], reason: str = "abort") -> tuple[str, ...]:
        for id in (found := tuple(id for id in dict.fromkeys(ids) if id in self.open)):
            self.open[id].abort(reason)
        return found

    async def pause(self, mode: str, *, drain: bool = False) -> None:
        self.paused = mode
        self.drained.append(drain)

    async def resume(self) -> None:
        self.paused = None

    # ---- versions -------------------------------------------------------------------------------------------------

    def resolve(self, request: RolloutRequest) -> PolicyVersion:
        version = self.find(request.policy.name, request.policy.number, request.policy.digest)
        if request.min_version is not None and version.number < request.min_version:
            raise StalePolicy(f"{version.name} is at {version.number}.", param="min_version")
        return version
