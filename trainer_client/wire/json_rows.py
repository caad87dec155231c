"""A Rollout object of JSON → a `Rollout`: of a reply, of a line of the stream, or what a binary reply writes out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from trainer_client.data.rollout import NO_TOKEN, PER_TOKEN, Rollout, RowFault, RowReward, Span
from trainer_client.data.versions import PolicyRef
from trainer_client.errors import BadReply
from trainer_client.wire.replies import need, need_objects

_ALWAYS_THERE = ("token_ids", "loss_mask", "logprobs")
_AS_THEY_ARE = frozenset(
    {"id", "prompt_id", "prompt_index", "sample_index", "finish_reason", "stop_reason", "seed", "text"}
    | {"sampling", "timings_ms"}
)


def parse_rollout(row: Mapping[str, Any]) -> Rollout:
    """One whole Rollout object. Raises `BadReply` with the row and the field where it breaks the contract."""
    where = f"rollout of prompt {row.get('prompt_index')}, sample {row.get('sample_index')},"
    for name in ("prompt_index", "sample_index", "seed"):
        need(row, name, int, where)
    need(row, "finish_reason", str, where)
    for name in (*_ALWAYS_THERE, "prompt_token_ids"):
        need(row, name, list, where)
    need_objects(row, "versions", where)
    known: dict[str, Any] = dict.fromkeys(
        (*PER_TOKEN, "top_ids", "top_logprobs", "prompt_logprobs", "text", "prompt_id", "id", "error", "stop_reason")
    )
    fields = known | row_fields(row, where)
    tokens = len(fields["token_ids"])
    for name in (*PER_TOKEN, "top_logprobs"):
        array = fields[name]
        if array is not None and len(array) != tokens:
            raise BadReply(f"The server's {where} has {len(array)} {name} for {tokens} tokens.")
    _check_tiling(fields["spans"], tokens, where)
    return Rollout(**fields)


def row_fields(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Arguments of `Rollout` for the fields that `entry` has; those without an attribute go into `raw`."""
    fields: dict[str, Any] = {}
    raw: dict[str, Any] = {}
    for name, value in entry.items():
        if name in PER_TOKEN:
            fields[name] = values_of(value, name, PER_TOKEN[name], where)
        elif name in _AS_THEY_ARE:
            fields[name] = value
        elif name == "prompt_token_ids":
            fields[name] = values_of(value, name, np.int32, where)
        elif name == "prompt_logprobs":
            fields[name] = values_of(value, name, np.float32, where)
        elif name == "top_logprobs":
            fields["top_ids"], fields["top_logprobs"] = top_of(value, where)
        elif name == "versions":
            fields["spans"] = tuple(span_of(span, where) for span in need_objects(entry, name, where))
        elif name == "reward":
            fields[name] = None if value is None else reward_of(value, where)
        elif name == "error":
            fields[name] = RowFault(str(value.get("code")), str(value.get("message"))) if value else None
        else:
            raw[name] = value
    return {**fields, "raw": raw} if raw else fields


def values_of(values: list[Any] | None, name: str, dtype: DTypeLike, where: str) -> Any:
    """An array, or None for an array that was not asked for."""
    try:
        return None if values is None else np.array(values, dtype)  # null becomes NaN
    except (TypeError, ValueError, OverflowError) as error:
        raise BadReply(f"The server's {where} has {name} that are not numbers: {error}.") from error


def top_of(top: list[Any] | None, where: str) -> tuple[Any, Any]:
    """(int32 ids, float32 log-probabilities), both [n, k], of [[id, log-probability]…] per position; `NO_TOKEN` and NaN
    at a position without. (None, None) where they were not asked for."""
    if top is None:
        return None, None
    k = max((len(pairs) for pairs in top if pairs is not None), default=0)
    nothing = [[NO_TOKEN, None]] * k
    try:
        both = np.array([nothing if pairs is None else pairs for pairs in top], np.float64).reshape(len(top), k, 2)
    except (TypeError, ValueError) as error:
        raise BadReply(f"The server's {where} has top_logprobs that are not pairs of numbers: {error}.") from error
    return np.ascontiguousarray(both[..., 0], np.int32), np.ascontiguousarray(both[..., 1], np.float32)


def reward_of(reward: Any, where: str) -> RowReward:
    """What a row's `reward` says."""
    if not isinstance(reward, Mapping):
        raise BadReply(f"The server's {where} has a reward that is no object.")
    if error := reward.get("error"):
        return RowReward(error=RowFault(str(error.get("code")), str(error.get("message"))))
    scores = values_of(need(reward, "scores", list, where), "reward scores", np.float64, where)
    return RowReward(scores=tuple(scores.tolist()), version=reward_model(need(reward, "model", dict, where), where))


def reward_model(model: Mapping[str, Any], where: str) -> PolicyRef:
    return PolicyRef(
        need(model, "name", str, where), need(model, "version", int, where), need(model, "digest", str, where)
    )


def span_of(span: Mapping[str, Any], where: str) -> Span:
    return Span(
        policy=span.get("policy"),
        version=span.get("version"),
        digest=span.get("digest"),
        label=span.get("label"),
        start=need(span, "start", int, where),
        end=need(span, "end", int, where),
        kv=span.get("kv"),
    )


def _check_tiling(spans: tuple[Span, ...], tokens: int, where: str) -> None:
    ends = [0, *(span.end for span in spans)]
    tiled = all(start == span.start < span.end for start, span in zip(ends[:-1], spans, strict=True))
    if not tiled or ends[-1] != tokens:
        raise BadReply(f"The versions of the server's {where} do not tile its {tokens} tokens.")
