"""The engine's results as JSON: rollouts, versions, spans, counts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

import msgspec
from litestar import Response

from rollout_server.engine.messages.status import ReplicaStatus
from rollout_server.engine.messages.versions import PolicyStatus, VersionStatus
from rollout_server.grammar import Constraint, GrammarKind
from rollout_server.rollout import (
    RECOMPUTED,
    FinishReason,
    GivenSpan,
    PolicyVersion,
    Rollout,
    RolloutRequest,
    RowError,
    RowReward,
    SamplingParams,
    Span,
)
from rollout_server.schemas.openai.chat import ChatRequest
from rollout_server.schemas.rollouts import Prompt
from rollout_server.text.detokenize import IncrementalText, whole_text


def json_response(content: Any, *, status_code: int = 200, headers: dict[str, str] | None = None) -> Response[bytes]:
    """NaN and infinities become null."""
    return Response(
        content=msgspec.json.encode(content), status_code=status_code, headers=headers, media_type="application/json"
    )


def policy_headers(versions: Iterable[PolicyVersion]) -> dict[str, str]:
    """`X-Policy: policy@7` and its digest; several versions, as a list, in the order they appear."""
    distinct = list(dict.fromkeys(versions))
    if not distinct:
        return {}
    return {
        "x-policy": ", ".join(map(str, distinct)),
        "x-policy-digest": ", ".join(version.digest for version in distinct),
    }


def rollout_entry(
    rollout: Rollout, *, request_id: str, prompt_id: str | None, returns: frozenset[str], text: str | None
) -> dict[str, Any]:
    """A Rollout as the contract writes it. Arrays that `returns` does not name are null; NaN becomes null."""
    sampling = "sampling_logprobs" in returns
    return {
        "id": f"{request_id}/{rollout.prompt_index}/{rollout.sample_index}",
        "prompt_id": prompt_id,
        "prompt_index": rollout.prompt_index,
        "sample_index": rollout.sample_index,
        "prompt_token_ids": rollout.prompt_ids,
        "token_ids": rollout.token_ids,
        "loss_mask": [*rollout.prefix.loss_mask, *[1] * rollout.sampled],
        "logprobs": rollout.logprobs,
        "sampling_logprobs": rollout.sampling_logprobs if sampling else None,
        "log_kept_mass": rollout.log_kept_mass if sampling else None,
        "entropy": rollout.entropy if "entropy" in returns else None,
        "base_logprobs": rollout.base_logprobs if "base_logprobs" in returns else None,
        "top_logprobs": rollout.top_logprobs,
        "prompt_logprobs": rollout.prompt_logprobs if "prompt_logprobs" in returns else None,
        "versions": [*map(given_span_entry, rollout.prefix.spans), *map(span_entry, rollout.spans)],
        "finish_reason": rollout.finish_reason,
        "stop_reason": rollout.stop_reason,
        "error": error_entry(rollout.error),
        "seed": rollout.seed,
        "sampling": sampling_entry(rollout.sampling),
        "text": text,
        "timings_ms": {
            "queued": round(rollout.timings.queued_ms, 3),
            "prefill": round(rollout.timings.prefill_ms, 3),
            "decode": round(rollout.timings.decode_ms, 3),
        },
        "reward": reward_entry(rollout.reward),
    }


def error_entry(error: RowError | None) -> dict[str, str] | None:
    return {"code": error.code, "message": error.message} if error else None


def reward_entry(reward: RowReward | None) -> dict[str, Any] | None:
    """The scores and what gave them, or why there are none."""
    if reward is None:
        return None
    if (version := reward.version) is None:
        return {"error": error_entry(reward.error)}
    model = {"name": version.called, "version": version.number, "digest": version.digest}
    return {"value": reward.value, "scores": reward.scores, "model": model}


def version_entry(version: PolicyVersion) -> dict[str, Any]:
    return {
        "policy": version.called,
        "version": version.number,
        "digest": version.digest,
        "label": version.label,
    }


def span_entry(span: Span) -> dict[str, Any]:
    entry = version_entry(span.version) | {"start": span.start, "end": span.end}
    return entry if span.kv is None else entry | {"kv": span.kv}


def given_span_entry(span: GivenSpan) -> dict[str, Any]:
    """A span of a prefix: whatever KV its tokens were sampled on, it was made anew."""
    return {
        "policy": span.policy,
        "version": span.version,
        "digest": span.digest,
        "label": span.label,
        "start": span.start,
        "end": span.end,
        "kv": RECOMPUTED,
    }


def sampling_entry(sampling: SamplingParams) -> dict[str, Any]:
    entry = {field.name: getattr(sampling, field.name) for field in fields(sampling)}
    entry["logit_bias"] = {str(token): value for token, value in sampling.logit_bias}
    entry["structured_outputs"] = structure_entry(entry.pop("constraint"))
    return entry


def structure_entry(constraint: Constraint | None) -> dict[str, Any] | None:
    """The `structured_outputs` that would have the same effect."""
    if constraint is None:
        return None
    grammar = constraint.grammar
    written = grammar.kind in (GrammarKind.JSON, GrammarKind.CHOICE)
    entry: dict[str, Any] = {grammar.kind.value: json.loads(grammar.text) if written else grammar.text}
    if grammar.whitespace is not None:
        entry |= {"whitespace_pattern": grammar.whitespace} if grammar.whitespace else {"disable_any_whitespace": True}
    return entry


def usage(rollouts: Iterable[Rollout], prompt_tokens: int) -> dict[str, Any]:
    """`prompt_tokens` counts every prompt once whatever its n, with its prefix, as do those of them that were cached;
    the end token is a completion token."""
    sampled = 0
    cached: dict[int, int] = {}
    for rollout in rollouts:
        sampled += rollout.sampled
        cached[rollout.prompt_index] = max(rollout.cached_tokens, cached.get(rollout.prompt_index, 0))
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": sampled,
        "total_tokens": prompt_tokens + sampled,
        "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
    }


def is_complete(rollouts: Iterable[Rollout]) -> bool:
    return all(rollout.finish_reason in (FinishReason.STOP, FinishReason.LENGTH) for rollout in rollouts)


def weight_of(rollouts: Iterable[Rollout]) -> int:
    """How much work rows are to write, on the scale of `json_body.LONG`: their tokens, and a cost for each row
    besides."""
    return sum(len(rollout.token_ids) + 32 for rollout in rollouts)


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def begins_turn(chat: Prompt | ChatRequest, sampling: SamplingParams) -> bool:
    """Returns whether the text is a turn that the chat template opened: the tokenizer may trim its start, and the
    template writes it back. What a grammar asks for stays as it is."""
    opened = chat.messages is not None and chat.add_generation_prompt and not chat.continue_final_message
    return opened and sampling.constraint is None


def text_ids(rollout: Rollout, *, include_stop: bool = False) -> Sequence[int]:
    """The tokens whose text belongs to the row: without the end token that stopped it."""
    if rollout.finish_reason is not FinishReason.STOP or isinstance(rollout.stop_reason, str):
        return rollout.token_ids
    if include_stop and rollout.stop_reason in rollout.sampling.stop_token_ids:
        return rollout.token_ids
    return rollout.token_ids[:-1]


def rollout_text(rollout: Rollout, tokenizer: Any, request: RolloutRequest, *, include_stop: bool = False) -> str:
    """The decoded text of a row of this request, cut before the stop string that ended it (or behind it)."""
    ids = text_ids(rollout, include_stop=include_stop)
    stop = rollout.stop_reason
    if rollout.finish_reason is not FinishReason.STOP or not isinstance(stop, str):
        return whole_text(tokenizer, request, ids)
    decoder = IncrementalText.of(tokenizer, request)
    decoder.push(ids[:-1])
    before = decoder.length
    decoder.push(ids[-1:])
    decoder.finish()
    # The last token completes the string: one that stands earlier came before min_tokens and stopped nothing.
    at = decoder.text.find(stop, max(0, before - len(stop) + 1))
    if at < 0:
        return decoder.text
    return decoder.text[: at + len(stop)] if include_stop else decoder.text[:at]


def milliseconds(seconds: float) -> float:
    return round(1e3 * seconds, 3)


def policy_entry(policy: PolicyStatus, name: str, replicas: Sequence[ReplicaStatus] = ()) -> dict[str, Any]:
    """`name` is what requests call it. In a fleet each version says how many of its `replicas` have staged it."""
    return {
        "name": name,
        "live": policy.live.number if policy.live else None,
        "versions": [version_status(version) | _staged(version, replicas) for version in policy.versions],
    }


def _staged(status: VersionStatus, replicas: Sequence[ReplicaStatus]) -> dict[str, Any]:
    if not replicas:
        return {}
    at = (status.version.name, status.version.number)
    return {"replicas": {"staged": sum(at in replica.held for replica in replicas), "of": len(replicas)}}


def version_status(status: VersionStatus) -> dict[str, Any]:
    return {
        "version": status.version.number,
        "digest": status.version.digest,
        "label": status.version.label,
        "kind": status.kind,
        "mode": status.mode,
        "live": status.live,
        "pinned": status.pinned,
        "rows_in_use": status.rows_in_use,
        "bytes": status.nbytes,
        "resident_bytes": status.resident_bytes,
        "created": status.created,
        "task": status.task,
        "labels": status.labels,
    }


def replica_entry(replica: ReplicaStatus) -> dict[str, Any]:
    """One engine of a fleet, as lists of them show it."""
    return {
        "id": replica.id,
        "state": replica.state,
        "device": replica.device,
        "pid": replica.pid,
        "rows": replica.rows,
        "versions_staged": replica.versions_staged,
        "last_seen_s": round(replica.last_seen_s, 3),
        "restarts": replica.restarts,
    }
