"""What the page shows at one moment, as JSON: numbers of the engine, rows, versions, and which rollouts ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from rollout_server.engine.messages.control import RowsSeen
from rollout_server.engine.messages.versions import PolicyStatus, VersionStatus
from rollout_server.errors import RolloutError
from rollout_server.http.observing.latest_rollouts import Kept
from rollout_server.http.observing.observer import Sample
from rollout_server.http.observing.version_totals import VersionTotals
from rollout_server.http.replies.json_entries import replica_entry, version_status
from rollout_server.http.replies.streaming import sse_event
from rollout_server.http.service import Service
from rollout_server.rollout import BASE, Rollout

FRAMES_KEY = "frames"
"""Key of the application's state."""
FRAME_S = 1.0
"""Between two frames of a stream."""
FRESH_S = 0.25
"""A frame that is younger is told to further viewers as it is."""
LOOK_S = 2.0
"""How long the engine's thread may take to show its rows, between two steps; then a frame shows none."""
MOST_POLICIES = 32
MOST_VERSIONS = 32
"""How many of a policy are shown; the newest."""


class Frames:
    """Frames of one application; however many look, the engine is asked for its rows a few times a second at most."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._lock = asyncio.Lock()
        self._made = float("-inf")
        self._frame: dict[str, Any] = {}

    async def frame(self, *, fresh: bool = False) -> Mapping[str, Any]:
        """How things stand now, or unless it has to be `fresh`, how they stood a moment ago."""
        async with self._lock:
            if fresh or time.monotonic() - self._made >= FRESH_S:
                self._frame = await self._make()
                self._made = time.monotonic()
            return self._frame

    async def opening(self) -> dict[str, Any]:
        """A frame with what went before."""
        observer = self._service.observer
        return {
            **await self.frame(fresh=True),
            "history": list(observer.samples),
            "moves": [move._asdict() for move in observer.moves_since(0)[1]],
            "fields": Sample._fields,
        }

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events, a frame each, until the server is told to stop; each has the moves since the last one."""
        stopping, observer = self._service.stopping, self._service.observer
        told = await self.opening()
        moved, _ = observer.moves_since(0)
        while True:
            yield sse_event(told)
            try:
                await asyncio.wait_for(stopping.wait(), FRAME_S)
            except TimeoutError:
                frame = await self.frame()
                moved, new = observer.moves_since(moved)
                told = {**frame, "moves": [move._asdict() for move in new]}
            else:
                return

    async def _make(self) -> dict[str, Any]:
        service = self._service
        status, observer = service.engine.status, service.observer
        named = [policy for policy in status.policies if policy.name != BASE]
        return {
            "instance": service.instance,
            "started": service.created,
            "state": status.state,
            "fault": status.fault,
            "paused": status.paused,
            "now": observer.sample(),
            "base": self._base(),
            "others": list(service.residents),
            "rows": rows_entry(await self._rows()),
            "replicas": [replica_entry(replica) for replica in status.replicas],
            "min_replicas": status.fewest,
            "policies": [self._policy(policy) for policy in named[:MOST_POLICIES]],
            "more_policies": max(0, len(named) - MOST_POLICIES),
            "rollouts": [summary(kept) for kept in observer.rollouts],
            "keys": {
                "inference": service.config.protected,
                "administration": service.config.protected and service.config.admin_key is not None,
                "changes": not service.config.protected or service.config.admin_key is not None,
            },
        }

    async def _rows(self) -> RowsSeen | None:
        """The rows; an engine at rest is left alone."""
        status = self._service.engine.status
        if status.state != "ready" or not status.running + status.preempted:
            return None
        try:
            async with asyncio.timeout(LOOK_S):
                return await self._service.engine.rows()
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

    def _policy(self, policy: PolicyStatus) -> dict[str, Any]:
        return {
            "name": policy.name,
            "live": policy.live.number if policy.live else None,
            "last": policy.last,
            "more": max(0, len(policy.versions) - MOST_VERSIONS),
            "versions": [self._version(policy.name, kept) for kept in policy.versions[-MOST_VERSIONS:]],
        }

    def _version(self, name: str, kept: VersionStatus) -> dict[str, Any]:
        observer, number = self._service.observer, kept.version.number
        push, totals = observer.push_of(name, number), observer.versions.of(name, number)
        # Totals of a name that was deleted and restored may be another version's.
        own = totals if totals is not None and totals.version.digest == kept.version.digest else None
        return {
            **version_status(kept),
            "rank": kept.rank,
            "modules": kept.modules,
            "delta_norm": push.delta_norm if push else None,
            "timings_ms": push.timings_ms if push else None,
            "totals": totals_entry(own),
        }


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


def rows_entry(seen: RowsSeen | None) -> dict[str, Any]:
    """Rows as `[version, tokens, most, preempted, request]`, where the first and the last are places in lists. `counts`
    are of all rows by version, `count` of all, those included that are not among `rows`."""
    if seen is None:
        return {"count": 0, "versions": [], "counts": [], "requests": [], "rows": []}
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
