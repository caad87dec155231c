"""Replies → values: one pure function per route. Both clients use them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from trainer_client.batch import RolloutBatch
from trainer_client.errors import BadReply, DigestMismatch
from trainer_client.replies import Reply, error_of, need, need_objects, parse_json
from trainer_client.rollout import PER_TOKEN, Rollout, RowFault, Span
from trainer_client.versions import KeptVersion, PolicyLine, PolicyRef, PublishedVersion, ServedModel

_ALWAYS_THERE = ("token_ids", "loss_mask", "logprobs")
_ROLLOUT_FIELDS = frozenset(
    {
        *PER_TOKEN,
        *("prompt_index", "sample_index", "prompt_token_ids", "versions", "finish_reason", "stop_reason", "seed"),
        *("text", "prompt_id", "error", "sampling", "timings_ms"),
    }
)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Scored:
    """Teacher-forced log-probabilities: sequence i owns `offsets[i]:offsets[i + 1]`, its positions `start…`."""

    logprobs: NDArray[np.float32]
    """[N]; NaN at position 0 of a sequence, which nothing precedes."""
    offsets: NDArray[np.int64]
    """[S + 1]"""
    entropy: NDArray[np.float32] | None
    """[N], nats; None unless asked for."""
    top_logprobs: tuple[list[Any] | None, ...]
    """Per sequence, per position the k most probable [id, log-probability]; None unless asked for."""
    temperature: float
    """What the logits were divided by first."""
    versions: tuple[PolicyRef, ...]
    """All that scored them."""
    spans: tuple[tuple[Span, ...], ...]
    """Per sequence, what its positions were read under, counted from `start`."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, sequence: int) -> NDArray[np.float32]:
        """`logprobs` of one sequence, as a view."""
        index = range(len(self))[sequence]
        return self.logprobs[self.offsets[index] : self.offsets[index + 1]]


# ---- rollouts -----------------------------------------------------------------------------------------------------


def parse_reply(reply: Reply) -> RolloutBatch:
    """The batch of a `/v1/rollouts` reply, whatever its encoding."""
    if reply.media_type != "application/json":
        raise BadReply(f"The rollouts came as {reply.media_type or 'no content type'!r}; this client reads JSON.")
    body = parse_json(reply.body)
    rows = need_objects(body, "rollouts")
    return RolloutBatch.of(
        (parse_rollout(row) for row in rows),
        policy=_alias(need(body, "policy", dict)),
        instance=need(body, "instance", str),
        complete=need(body, "complete", bool),
        usage=body.get("usage") or {},
        timings_ms=body.get("timings_ms") or {},
    )


def parse_rollout(row: Mapping[str, Any]) -> Rollout:
    """One Rollout object: of a JSON reply or of a line of the stream."""
    where = f"rollout of prompt {row.get('prompt_index')}, sample {row.get('sample_index')},"
    token_ids = need(row, "token_ids", list, where)
    spans = tuple(_span(span, where) for span in need_objects(row, "versions", where))
    _check_tiling(spans, len(token_ids), where)
    arrays: dict[str, Any] = {
        name: _values(need(row, name, list, where) if name in _ALWAYS_THERE else row.get(name), name, dtype, where)
        for name, dtype in PER_TOKEN.items()
    }
    for name, array in arrays.items():
        if array is not None and len(array) != len(token_ids):
            raise BadReply(f"The server's {where} has {len(array)} {name} for {len(token_ids)} tokens.")
    error = row.get("error")
    return Rollout(
        prompt_index=need(row, "prompt_index", int, where),
        sample_index=need(row, "sample_index", int, where),
        prompt_token_ids=_values(need(row, "prompt_token_ids", list, where), "prompt_token_ids", np.int32, where),
        **arrays,
        spans=spans,
        finish_reason=need(row, "finish_reason", str, where),
        stop_reason=row.get("stop_reason"),
        seed=need(row, "seed", int, where),
        text=row.get("text"),
        prompt_id=row.get("prompt_id"),
        error=RowFault(str(error.get("code")), str(error.get("message"))) if isinstance(error, dict) else None,
        sampling=row.get("sampling") or {},
        timings_ms=row.get("timings_ms") or {},
        raw={name: value for name, value in row.items() if name not in _ROLLOUT_FIELDS},
    )


def parse_line(line: bytes) -> Rollout | None:
    """One line of the NDJSON stream: a row, or None for the last line. Raises what an error line says."""
    entry = parse_json(line)
    if entry.get("done") is True:
        return None
    # a row that failed carries its own `error` beside its tokens
    if "token_ids" not in entry and isinstance(entry.get("error"), dict):
        raise error_of(entry["error"])
    return parse_rollout(entry)


def _values(values: list[Any] | None, name: str, dtype: DTypeLike, where: str) -> Any:
    """An array, or None for an array that was not asked for."""
    try:
        return None if values is None else np.array(values, dtype)  # null becomes NaN
    except (TypeError, ValueError, OverflowError) as error:
        raise BadReply(f"The server's {where} has {name} that are not numbers: {error}.") from error


def _span(span: Mapping[str, Any], where: str) -> Span:
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


# ---- log-probabilities --------------------------------------------------------------------------------------------


def parse_scored(reply: Reply) -> Scored:
    body = parse_json(reply.body)
    sequences = need_objects(body, "sequences")
    logprobs = [_values(need(entry, "logprobs", list), "logprobs", np.float32, "reply") for entry in sequences]
    entropy = [_values(entry.get("entropy"), "entropy", np.float32, "reply") for entry in sequences]
    return Scored(
        logprobs=np.concatenate([np.zeros(0, np.float32), *logprobs]),
        offsets=np.cumsum([0, *map(len, logprobs)], dtype=np.int64),
        entropy=None if any(part is None for part in entropy) else np.concatenate([np.zeros(0, np.float32), *entropy]),
        top_logprobs=tuple(entry.get("top_logprobs") for entry in sequences),
        temperature=float(body.get("temperature", 1.0)),
        versions=tuple(
            PolicyRef(need(entry, "policy", str), need(entry, "version", int), need(entry, "digest", str))
            for entry in need_objects(body, "versions")
        ),
        spans=tuple(
            tuple(_span(span, f"sequence {index}") for span in entry.get("versions") or ())
            for index, entry in enumerate(sequences)
        ),
    )


# ---- weights and models -------------------------------------------------------------------------------------------


def parse_published(reply: Reply, sent_digest: str | None) -> PublishedVersion:
    """The version that `push` made or `activate` chose. With `sent_digest`, raises `DigestMismatch` unless the server
    answers the same."""
    body = parse_json(reply.body)
    digest = need(body, "digest", str)
    if sent_digest is not None and digest != sent_digest:
        raise DigestMismatch(
            f"The server published {body.get('name')}@{body.get('version')} with digest {digest}, but the tensors and "
            f"config sent here have {sent_digest}: some were lost, transposed or scaled differently. "
            "Do not train on its rollouts; activate an earlier version."
        )
    return PublishedVersion(
        name=need(body, "name", str),
        version=need(body, "version", int),
        digest=digest,
        label=body.get("label"),
        live=need(body, "live", bool),
        unchanged=need(body, "unchanged", bool),
        verified=sent_digest is not None,
        instance=need(body, "instance", str),
        kind=body.get("kind"),
        mode=body.get("mode"),
        rank=body.get("rank"),
        nbytes=body.get("bytes"),
        base=body.get("base") or {},
        report=body.get("report") or {},
        timings_ms=body.get("timings_ms") or {},
    )


def parse_weights(reply: Reply) -> tuple[PolicyLine, ...]:
    """Every name of `GET /v1/weights`."""
    body = parse_json(reply.body)
    return tuple(_policy_line({"instance": body.get("instance"), **entry}) for entry in need_objects(body, "policies"))


def parse_policy(reply: Reply) -> PolicyLine:
    return _policy_line(parse_json(reply.body))


def parse_models(reply: Reply) -> tuple[ServedModel, ...]:
    return tuple(
        ServedModel(
            id=need(entry, "id", str),
            digest=entry.get("digest"),
            max_model_len=entry.get("max_model_len"),
            vocab_size=entry.get("vocab_size"),
            dtype=entry.get("dtype"),
            quantization=entry.get("quantization"),
            eos_token_ids=tuple(entry.get("eos_token_ids") or ()),
        )
        for entry in need_objects(parse_json(reply.body), "data")
    )


def _alias(entry: Mapping[str, Any]) -> PolicyRef | None:
    """Where a name points; None before its first activation."""
    if entry.get("version") is None:
        return None
    return PolicyRef(need(entry, "name", str), need(entry, "version", int), need(entry, "digest", str))


def _policy_line(entry: Mapping[str, Any]) -> PolicyLine:
    name = need(entry, "name", str)
    return PolicyLine(
        name=name,
        live=entry.get("live"),
        versions=tuple(parse_kept_version(version, f"policy {name!r}") for version in need_objects(entry, "versions")),
        instance=entry.get("instance"),
    )


def parse_kept_version(entry: Mapping[str, Any], where: str) -> KeptVersion:
    """One entry of a policy's `versions`."""
    return KeptVersion(
        version=need(entry, "version", int, where),
        digest=need(entry, "digest", str, where),
        live=need(entry, "live", bool, where),
        label=entry.get("label"),
        kind=entry.get("kind"),
        mode=entry.get("mode"),
        pinned=entry.get("pinned") is True,
        rows_in_use=entry.get("rows_in_use") or 0,
        nbytes=entry.get("bytes"),
        created=entry.get("created"),
    )
