"""The binary encoding of replies: one safetensors file of flat arrays, and JSON in its metadata for what is no array.

It is made of the very content that would have been sent as JSON, so both encodings say the same: arrays leave their
rows and become one each; whatever else a row says goes into `reply`, in columns, since a row's worth of JSON weighs as
much as many of its tokens. What the arrays cannot say of a row (a null array where others have one, two versions of
one number) is written out for that row under `reply.rollouts.rows`, and overrides them.

    reply = the JSON reply, with rollouts = {"sampling": [distinct…], "sampling_of": [R], "timings_ms": {name: [R]},
    "reward_model": what scored them, if rewards were asked for, "rows": {"row": {field: value}}}
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
from litestar import Response
from numpy.typing import DTypeLike, NDArray
from safetensors.numpy import save

from rollout_server.http.requests.json_body import SAFETENSORS
from rollout_server.rollout import FinishReason

FORMAT = "1"
Entries = Sequence[Mapping[str, Any]]
Arrays = dict[str, NDArray[Any]]

PER_TOKEN: Mapping[str, DTypeLike] = MappingProxyType(
    {
        "token_ids": np.int32,
        "loss_mask": np.uint8,
        "logprobs": np.float32,
        "sampling_logprobs": np.float32,
        "log_kept_mass": np.float32,
        "entropy": np.float32,
        "base_logprobs": np.float32,
    }
)
PER_ROW: Mapping[str, DTypeLike] = MappingProxyType(
    {"prompt_index": np.int32, "sample_index": np.int32, "seed": np.int64}
)
NO_VERSION = NO_TOKEN = -1
"""Stands where there is none."""
NOWHERE = (None, None, None)
"""Policy, digest and label of given text that came without versions."""
KV_KINDS = (None, "carried", "recomputed")
FINISH_REASONS = tuple(reason.value for reason in FinishReason)
PLACED = frozenset(
    {*PER_TOKEN, *PER_ROW, "finish_reason", "prompt_token_ids", "prompt_logprobs", "top_logprobs", "versions"}
    | {"id", "prompt_id", "stop_reason", "text", "sampling", "timings_ms", "reward"}
)
"""Fields of a Rollout with a place of their own; others are written out where they are not null."""


def binary_response(content: bytes) -> Response[bytes]:
    return Response(content=content, status_code=200, media_type=SAFETENSORS)


def rollouts_file(content: Mapping[str, Any], labels: int = 0) -> bytes:
    """The reply of `/v1/rollouts` (its JSON content) as a file; `labels` is how many the reward model scores, which no
    row says where all rewards failed."""
    rows: Entries = content["rollouts"]
    written: dict[int, dict[str, Any]] = {}

    def write_out(row: int, field: str) -> None:
        written.setdefault(row, {})[field] = rows[row][field]

    arrays: Arrays = {"offsets": _offsets([len(row["token_ids"]) for row in rows])}
    for name, dtype in PER_TOKEN.items():
        _add_per_token(arrays, rows, name, dtype, write_out)
    _add_top(arrays, rows, write_out)
    for name, dtype in PER_ROW.items():
        arrays[name] = np.array([row[name] for row in rows], dtype)
    arrays["finish_reason"] = np.array([FINISH_REASONS.index(row["finish_reason"]) for row in rows], np.uint8)
    prompt_ids = _add_prompts(arrays, rows, write_out)
    policies = _add_spans(arrays, rows, write_out)
    reward_model = _add_rewards(arrays, rows, labels, write_out)
    for index, row in enumerate(rows):
        for field in row.keys() - PLACED:
            if row[field] is not None:
                write_out(index, field)
    metadata = {
        "ids": [row["id"] for row in rows],
        "prompt_ids": prompt_ids,
        "stop_reasons": [row["stop_reason"] for row in rows],
        "policies": policies,
        "reply": {**content, "rollouts": {**_columns(rows), **reward_model, "rows": written}},
    }
    if any(row["text"] is not None for row in rows):
        metadata["texts"] = [row["text"] for row in rows]
    return _file(arrays, metadata)


def rewards_file(content: Mapping[str, Any]) -> bytes:
    """The reply of `/v1/rewards` as a file: `scores` f32[R, L], NaN where only steps were read; with steps
    `step_scores` f32[S, L] and `step_offsets` i64[R+1]; what else it says in `reply`."""
    rewards: Entries = content["rewards"]
    width = len(content["labels"])
    none = [float("nan")] * width
    arrays: Arrays = {"scores": np.array([entry["scores"] or none for entry in rewards], np.float32)}
    if rewards[0]["steps"] is not None:
        steps = [step for entry in rewards for step in entry["steps"]]
        arrays["step_scores"] = np.array(steps, np.float32).reshape(-1, width)
        arrays["step_offsets"] = _offsets([len(entry["steps"]) for entry in rewards])
    rest = {"tokens": [entry["tokens"] for entry in rewards]}
    return _file(arrays, {"reply": {**content, "rewards": rest}})


def scores_file(content: Mapping[str, Any]) -> bytes:
    """The reply of `/v1/logprobs` as a file: `logprobs` and `entropy` f32[N], `offsets` i64[S+1], `top_ids` and
    `top_logprobs` [N, k]; the rest of each sequence stays in `reply`."""
    sequences: Entries = content["sequences"]
    arrays: Arrays = {"offsets": _offsets([len(entry["logprobs"]) for entry in sequences])}

    def none_left(row: int, field: str) -> None:
        raise ValueError(f"sequence {row} has no {field}, and others have")

    for name in ("logprobs", "entropy"):
        _add_per_token(arrays, sequences, name, np.float32, none_left)
    _add_top(arrays, sequences, none_left)
    moved = {"logprobs", "entropy", "top_logprobs"}
    rest = [{name: value for name, value in entry.items() if name not in moved} for entry in sequences]
    return _file(arrays, {"reply": {**content, "sequences": rest}})


def _file(arrays: Arrays, metadata: Mapping[str, Any]) -> bytes:
    texts = {name: msgspec.json.encode(value).decode() for name, value in metadata.items()}
    return save(arrays, {"format": FORMAT, **texts})


# ---- arrays -------------------------------------------------------------------------------------------------------


def _offsets(lengths: Iterable[int]) -> NDArray[np.int64]:
    return np.fromiter(accumulate(lengths, initial=0), np.int64)


def _flat(parts: Iterable[Sequence[Any]], dtype: DTypeLike) -> NDArray[Any]:
    """Joined row by row, so that other threads get their turn in between. A missing value becomes NaN."""
    return np.concatenate([np.zeros(0, dtype), *(np.array(part, dtype) for part in parts)], dtype=dtype)


def _add_per_token(
    arrays: Arrays, rows: Entries, name: str, dtype: DTypeLike, write_out: Callable[[int, str], None]
) -> None:
    """An array that no row has is absent; a row that lacks it where others do not gets NaN and is written out."""
    if all(row[name] is None for row in rows):
        return
    length = "logprobs"
    parts = []
    for index, row in enumerate(rows):
        if row[name] is None:
            write_out(index, name)
        parts.append((np.nan,) * len(row[length]) if row[name] is None else row[name])
    arrays[name] = _flat(parts, dtype)


def _add_top(arrays: Arrays, rows: Entries, write_out: Callable[[int, str], None]) -> None:
    """`top_ids` i32 and `top_logprobs` f32, both [N, k]; −1 and NaN for rows without."""
    lists = [row["top_logprobs"] for row in rows]
    if all(top is None for top in lists):
        return
    k = max((next((len(pairs) for pairs in top if pairs is not None), 0) for top in lists if top), default=0)
    parts = [np.zeros((0, k, 2))]
    for index, top in enumerate(lists):
        if top is None:
            write_out(index, "top_logprobs")
            parts.append(np.tile([NO_TOKEN, np.nan], (len(rows[index]["logprobs"]), k, 1)))
        else:
            parts.append(_pairs(top, k))
    both = np.concatenate(parts)
    arrays["top_ids"] = np.ascontiguousarray(both[..., 0], np.int32)
    arrays["top_logprobs"] = np.ascontiguousarray(both[..., 1], np.float32)


def _pairs(top: Sequence[Sequence[Sequence[float]] | None], k: int) -> NDArray[np.float64]:
    """[tokens, k, 2]; a position without, as the first of a sequence, has −1 and NaN."""
    nothing = ((NO_TOKEN, np.nan),) * k
    return np.array([nothing if pairs is None else pairs for pairs in top], np.float64).reshape(len(top), k, 2)


def _add_prompts(arrays: Arrays, rows: Entries, write_out: Callable[[int, str], None]) -> list[Any]:
    """Each prompt once, with its log-probabilities if there are any; returns the prompts' own ids."""
    firsts: dict[int, Mapping[str, Any]] = {}
    for index, row in enumerate(rows):
        first = firsts.setdefault(row["prompt_index"], row)
        for field in ("prompt_token_ids", "prompt_id"):
            if row[field] != first[field]:
                write_out(index, field)
    prompts = [firsts.get(index) for index in range(max(firsts, default=-1) + 1)]
    tokens = [prompt["prompt_token_ids"] if prompt else () for prompt in prompts]
    arrays["prompt_token_ids"] = _flat(tokens, np.int32)
    arrays["prompt_offsets"] = _offsets(map(len, tokens))
    if any(row["prompt_logprobs"] is not None for row in rows):
        _add_prompt_logprobs(arrays, rows, tokens, write_out)
    return [prompt["prompt_id"] if prompt else None for prompt in prompts]


def _add_prompt_logprobs(
    arrays: Arrays, rows: Entries, tokens: Sequence[Sequence[int]], write_out: Callable[[int, str], None]
) -> None:
    """A prompt's samples share them, but for rows that failed before, or ran under another version."""
    shared: dict[int, Any] = {}
    for row in rows:
        if row["prompt_logprobs"] is not None:
            shared.setdefault(row["prompt_index"], row["prompt_logprobs"])
    for index, row in enumerate(rows):
        if row["prompt_logprobs"] is None or row["prompt_logprobs"] != shared[row["prompt_index"]]:
            write_out(index, "prompt_logprobs")
    parts = [shared.get(index, (np.nan,) * len(ids)) for index, ids in enumerate(tokens)]
    arrays["prompt_logprobs"] = _flat(parts, np.float32)


def _add_spans(arrays: Arrays, rows: Entries, write_out: Callable[[int, str], None]) -> dict[str, Any]:
    """Spans by version number; returns {policy: {version: {digest, label}}}. A row with a span that its number does not
    lead back to (another policy's, or one without a version) is written out."""
    table: dict[int, tuple[Any, Any, Any]] = {}
    versions: list[int] = []
    ends: list[int] = []
    kinds: list[int] = []
    for index, row in enumerate(rows):
        plain = True
        for span in row["versions"]:
            number = NO_VERSION if span["version"] is None else span["version"]
            about = (span["policy"], span["digest"], span["label"])
            plain &= about == (NOWHERE if number == NO_VERSION else table.setdefault(number, about))
            versions.append(number)
            ends.append(span["end"])
            kinds.append(KV_KINDS.index(span.get("kv")))
        if not plain:
            write_out(index, "versions")
    arrays["span_offsets"] = _offsets([len(row["versions"]) for row in rows])
    arrays["span_version"] = np.array(versions, np.int32)
    arrays["span_end"] = np.array(ends, np.int64)
    arrays["span_kv"] = np.array(kinds, np.uint8)
    policies: dict[str, Any] = {}
    for number, (policy, digest, label) in table.items():
        policies.setdefault(policy, {})[str(number)] = {"digest": digest, "label": label}
    return policies


def _add_rewards(arrays: Arrays, rows: Entries, labels: int, write_out: Callable[[int, str], None]) -> dict[str, Any]:
    """`reward` f32[R] and `reward_scores` f32[R, L], NaN for none; returns what gave them, by its field. A row without
    says why where it is written out."""
    rewards = [row["reward"] for row in rows]
    if not any(rewards):
        return {}
    scores = [reward.get("scores") if reward else None for reward in rewards]
    labels = max((len(own) for own in scores if own is not None), default=labels)
    models = [reward["model"] for reward in rewards if reward and "model" in reward]
    for index, reward in enumerate(rewards):
        if not reward or "error" in reward or reward["model"] != models[0]:
            write_out(index, "reward")
    values = [reward.get("value") if reward else None for reward in rewards]
    none = (np.nan,) * labels
    arrays["reward"] = np.array(values, np.float32)
    matrix = np.array([none if own is None else own for own in scores], np.float32)
    arrays["reward_scores"] = matrix.reshape(len(rows), labels)
    return {"reward_model": models[0] if models else None}


# ---- what is no array ---------------------------------------------------------------------------------------------


def _columns(rows: Entries) -> dict[str, Any]:
    """Effective sampling parameters once each, and timings as one list per name."""
    distinct: dict[bytes, int] = {}
    which = [distinct.setdefault(msgspec.json.encode(row["sampling"]), len(distinct)) for row in rows]
    names = rows[0]["timings_ms"] if rows else ()
    return {
        "sampling": [msgspec.Raw(text) for text in distinct],
        "sampling_of": which,
        "timings_ms": {name: [row["timings_ms"][name] for row in rows] for name in names},
    }
