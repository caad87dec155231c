"""What the page shows at one moment, as JSON: numbers of the engine, rows, versions, and which rollouts ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from rollout_server.engine.messages.control import RowsSeen
from rollout_server.engine.messages.versions import PolicyStatus, VersionStatus
from rollout_server.errors import RolloutError
from rollout_server.http.observing.latest_rollouts import Kept
from rollout_server.http.observing.observer import Sample
from rollout_server.http.observing.version_totals import VersionTotals
from rollout_server.http.page.differences import Frame, Piece, PolicyPieces, as_it_is
from rollout_server.http.replies.json_entries import replica_entry, version_status
from rollout_server.http.replies.streaming import sse_event
from rollout_server.http.service import Service
from rollout_server.rollout import BASE, Rollout

FRAMES_KEY = "frames"
"""Key of the application's state: the frames of each model, by what requests call it."""
FRAME_S = 1.0
"""Between two frames of a stream. Streams are told at the same moments, so that a frame serves all of them."""
FRESH_S = 0.25
"""A frame that is younger is told as it is."""
LOOK_S = 2.0
"""How long the engine's thread may take to show its rows, between two steps; then a frame says that they are not
known."""
NO_ROWS = RowsSeen("none", (), 0, ())
MOST_POLICIES = 32
MOST_VERSIONS = 32
"""How many of a policy are shown; the newest."""


class Frames:
    """Frames of one model. Nothing is made while nobody looks; however many look, the engine is asked for its rows once
    a second, and once for each who begins to; and what is new since the frame before is encoded once."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._lock = asyncio.Lock()
        self._made = float("-inf")
        self._frame: Frame | None = None
        self._event: tuple[Frame, Frame, bytes] | None = None
        """The latest event, between which frames it stands."""

    async def frame(self, *, fresh: bool = False) -> Frame:
        """How things stand now, or unless it has to be `fresh`, how they stood a moment ago."""
        async with self._lock:
            clock = asyncio.get_running_loop().time
            if self._frame is None or fresh or clock() - self._made >= FRESH_S:
                self._frame = await self._make(self._frame)
                self._made = clock()
            return self._frame

    async def opening(self) -> dict[str, Any]:
        """A whole frame with what went before."""
        return self._opening(await self.frame(fresh=True))

    def _opening(self, frame: Frame) -> dict[str, Any]:
        return {
            **frame.told(Frame()),
            "history": list(self._service.observer.samples),
            "fields": Sample._fields,
        }

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events until the server is told to stop: a whole frame, then of each later one what is new."""
        stopping, clock = self._service.stopping, asyncio.get_running_loop().time
        seen = await self.frame(fresh=True)
        yield sse_event(self._opening(seen))
        tick = 0.0
        while True:
            # A timer may be early by as much as the clock tells apart: no moment comes twice.
            tick = max(tick, clock() // FRAME_S) + 1
            try:
                await asyncio.wait_for(stopping.wait(), max(0.0, tick * FRAME_S - clock()))
            except TimeoutError:
                before, seen = seen, await self.frame()
                yield self._since(before, seen)
            else:
                return

    def _since(self, before: Frame, frame: Frame) -> bytes:
        """What is new, for all who saw the same frame before."""
        if self._event is None or self._event[0] is not before or self._event[1] is not frame:
            self._event = (before, frame, sse_event(frame.told(before)))
        return self._event[2]

    async def _make(self, before: Frame | None) -> Frame:
        before = Frame() if before is None else before
        parts = self._parts() | {"rows": await self._rows()}
        observer = self._service.observer
        moved, moves = observer.moves_since(0)
        return Frame(
            {name: as_it_is(before.parts.get(name), value) for name, value in parts.items()},
            {one.name: self._policy(one, before.policies.get(one.name)) for one in self._named()[:MOST_POLICIES]},
            {
                kept.number: before.rollouts.get(kept.number) or Piece.of(kept, summary(kept))
                for kept in observer.rollouts
            },
            moved,
            moves,
        )

    def _named(self) -> Sequence[PolicyStatus]:
        return [policy for policy in self._service.engine.status.policies if policy.name != BASE]

    def _parts(self) -> dict[str, Any]:
        service, status, config = self._service, self._service.engine.status, self._service.config
        return {
            "instance": service.instance,
            "started": service.created,
            "state": status.state,
            "fault": status.fault,
            "paused": status.paused,
            "now": service.observer.sample(),
            "base": self._base(),
            "model": service.name,
            "models": [BASE, *service.residents],
            "replicas": [replica_entry(replica) for replica in status.replicas],
            "min_replicas": status.fewest,
            "more_policies": max(0, len(self._named()) - MOST_POLICIES),
            "keys": {
                "inference": config.protected,
                "administration": config.protected and config.admin_key is not None,
                "changes": not config.protected or config.admin_key is not None,
            },
        }

    async def _rows(self) -> dict[str, Any] | None:
        """The rows, or None where an engine that has some did not show them in time; one at rest is left alone."""
        status = self._service.engine.status
        if status.state != "ready" or not status.running + status.preempted:
            return rows_entry(NO_ROWS)
        try:
            async with asyncio.timeout(LOOK_S):
                return rows_entry(await self._service.engine.rows())
        except (TimeoutError, RolloutError):
            return None

    def _base(self) -> dict[str, Any] | None:
        """What was loaded; None while it is loading."""
        try:
            info = self._service.engine.info
        except RolloutError:
            return None
        return {
            "id": info.id,
            "digest": info.digest,
            "dtype": info.dtype,
            "device": info.device,
            "task": info.task,
            "chat": bool(getattr(self._service.tokenizer, "chat_template", None)),
            "max_model_len": info.max_model_len,
            "totals": totals_entry(self._service.observer.versions.of(BASE, 0)),
        }

    def _policy(self, policy: PolicyStatus, before: PolicyPieces | None) -> PolicyPieces:
        head = {
            "name": policy.name,
            "live": policy.live.number if policy.live else None,
            "last": policy.last,
            "more": max(0, len(policy.versions) - MOST_VERSIONS),
        }
        known = {} if before is None else before.versions
        shown = policy.versions[-MOST_VERSIONS:]
        versions = {
            kept.version.number: self._version(policy.name, kept, known.get(kept.version.number)) for kept in shown
        }
        return PolicyPieces(head, versions)

    def _version(self, name: str, kept: VersionStatus, before: Piece | None) -> Piece:
        observer, number = self._service.observer, kept.version.number
        push, totals = observer.push_of(name, number), observer.versions.of(name, number)
        # Totals of a name that was deleted and restored may be another version's.
        own = totals if totals is not None and totals.version.digest == kept.version.digest else None
        stands_for = (kept, push, None if own is None else (own.tokens, own.rows))
        if before is not None and before.stands_for == stands_for:
            return before
        said = {
            **version_status(kept),
            "rank": kept.rank,
            "modules": kept.modules,
            "delta_norm": push.delta_norm if push else None,
            "timings_ms": push.timings_ms if push else None,
            "totals": totals_entry(own),
        }
        return Piece.of(stands_for, said)


def totals_entry(totals: VersionTotals | None) -> dict[str, Any] | None:
    """Sums of a version as means; None for what nothing is known of."""
    if totals is None:
        return None
    return {
        "rows": totals.rows,
        "tokens": totals.tokens,
        "mean_length": totals.row_tokens / totals.rows if totals.rows else None,
        "mean_staleness": totals.staleness / totals.rows if totals.rows else None,
        "mean_logprob": totals.logprobs.value,
        "mean_entropy": totals.entropy.value,
        "kl_to_base": totals.log_ratio.value,
        "finish_reasons": dict(totals.finish_reasons),
    }


def rows_entry(seen: RowsSeen) -> dict[str, Any]:
    """Rows as `[version, tokens, most, preempted, request]`, where the first and the last are places in lists. `counts`
    are of all rows by version, `count` of all, those included that are not among `rows`."""
    versions = [(version.name, version.number) for version, _ in seen.by_version]
    requests = list(dict.fromkeys(row.id for row in seen.rows))
    at = {version: place for place, version in enumerate(versions)}
    of = {id: place for place, id in enumerate(requests)}
    rows = [
        (at[row.version.name, row.version.number], row.tokens, row.most, int(row.preempted), of[row.id])
        for row in seen.rows
    ]
    counts = [count for _, count in seen.by_version]
    return {"count": seen.count, "versions": versions, "counts": counts, "requests": requests, "rows": rows}


def spans_entry(rollout: Rollout) -> Sequence[tuple[str, int, int, int]]:
    """Spans as `[policy, version, start, end]`."""
    return [(span.version.name, span.version.number, span.start, span.end) for span in rollout.spans]


def summary(kept: Kept) -> dict[str, Any]:
    """A rollout in a list: nothing of its text."""
    rollout = kept.rollout
    return {
        "number": kept.number,
        "request_id": kept.request_id,
        "sample": (rollout.prompt_index, rollout.sample_index),
        "ended": kept.ended,
        "tokens": rollout.sampled,
        "finish_reason": str(rollout.finish_reason),
        "spans": spans_entry(rollout),
        "strip": kept.strip,
        "reward": rollout.reward.value if rollout.reward else None,
    }
