"""Replies → values: one pure function per route. Both clients use them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer_client.data.batch import RolloutBatch
from trainer_client.data.rollout import Rollout, Span
from trainer_client.data.versions import KeptVersion, PolicyLine, PolicyRef, PublishedVersion, ServedModel
from trainer_client.errors import BadReply, DigestMismatch
from trainer_client.wire import binary_rows
from trainer_client.wire.binary_rows import BinaryRows, ReplyFile
from trainer_client.wire.json_rows import parse_rollout, span_of, top_of, values_of
from trainer_client.wire.replies import Reply, error_of, need, need_objects, parse_json


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Scored:
    """Teacher-forced log-probabilities: sequence i owns `offsets[i]:offsets[i + 1]`, its positions `start…`."""

    logprobs: NDArray[np.float32]
    """[N]; NaN at position 0 of a sequence, which nothing precedes."""
    offsets: NDArray[np.int64]
    """[S + 1]"""
    entropy: NDArray[np.float32] | None
    """[N], nats; None unless asked for."""
    top_ids: NDArray[np.int32] | None
    """[N, k]: per position the k most probable ids, best first; −1 where there is none. None unless asked for."""
    top_logprobs: NDArray[np.float32] | None
    """[N, k]: their log-probabilities."""
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
    match reply.media_type:
        case "application/json":
            body = parse_json(reply.body)
            return RolloutBatch.of((parse_rollout(row) for row in need_objects(body, "rollouts")), **_about(body))
        case binary_rows.MEDIA_TYPE:
            rows = BinaryRows(ReplyFile(reply.body))
            arrays: dict[str, Any] = rows.per_token
            return RolloutBatch(
                rollouts=rows,
                offsets=rows.offsets,
                prompt_index=rows.per_row["prompt_index"],
                sample_index=rows.per_row["sample_index"],
                seeds=rows.per_row["seed"],
                **arrays,
                **rows.rewards,
                **_about(rows.reply),
            )
        case other:
            raise BadReply(f"The rollouts came as {other or 'no content type'!r}, which this client does not read.")


def _about(body: Mapping[str, Any]) -> dict[str, Any]:
    """What a reply says of all its rows."""
    return {
        "policy": _alias(need(body, "policy", dict)),
        "instance": need(body, "instance", str),
        "complete": need(body, "complete", bool),
        "usage": body.get("usage") or {},
        "timings_ms": body.get("timings_ms") or {},
    }


def parse_line(line: bytes) -> Rollout | None:
    """One line of the NDJSON stream: a row, or None for the last line. Raises what an error line says."""
    entry = parse_json(line)
    if entry.get("done") is True:
        return None
    # a row that failed carries its own `error` beside its tokens
    if "token_ids" not in entry and isinstance(entry.get("error"), dict):
        raise error_of(entry["error"])
    return parse_rollout(entry)


# ---- log-probabilities --------------------------------------------------------------------------------------------


def parse_scored(reply: Reply) -> Scored:
    """The scores of a `/v1/logprobs` reply, whatever its encoding."""
    if reply.media_type == binary_rows.MEDIA_TYPE:
        return _binary_scored(ReplyFile(reply.body))
    body = parse_json(reply.body)
    sequences = need_objects(body, "sequences")
    logprobs = [values_of(need(entry, "logprobs", list), "logprobs", np.float32, "reply") for entry in sequences]
    entropy = [values_of(entry.get("entropy"), "entropy", np.float32, "reply") for entry in sequences]
    top = [top_of(entry.get("top_logprobs"), "reply") for entry in sequences]
    has_top = bool(top) and all(ids is not None for ids, _ in top)
    return Scored(
        logprobs=np.concatenate([np.zeros(0, np.float32), *logprobs]),
        offsets=np.cumsum([0, *map(len, logprobs)], dtype=np.int64),
        entropy=None if any(part is None for part in entropy) else np.concatenate([np.zeros(0, np.float32), *entropy]),
        top_ids=np.concatenate([ids for ids, _ in top]) if has_top else None,
        top_logprobs=np.concatenate([values for _, values in top]) if has_top else None,
        **_scored_about(body),
    )


def _binary_scored(file: ReplyFile) -> Scored:
    offsets = file.offsets("offsets", None, None)
    tokens = int(offsets[-1])
    top_ids = file.array("top_ids", np.int32, (tokens, None), required=False)
    return Scored(
        logprobs=file.array("logprobs", np.float32, (tokens,)),
        offsets=offsets,
        entropy=file.array("entropy", np.float32, (tokens,), required=False),
        top_ids=top_ids,
        top_logprobs=None if top_ids is None else file.array("top_logprobs", np.float32, top_ids.shape),
        **_scored_about(need({"reply": file.json("reply")}, "reply", dict)),
    )


def _scored_about(body: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "temperature": float(body.get("temperature", 1.0)),
        "versions": tuple(
            PolicyRef(need(entry, "policy", str), need(entry, "version", int), need(entry, "digest", str))
            for entry in need_objects(body, "versions")
        ),
        "spans": tuple(
            tuple(span_of(span, f"sequence {index}") for span in entry.get("versions") or ())
            for index, entry in enumerate(need_objects(body, "sequences"))
        ),
    }


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
            kv_bits=entry.get("kv_bits"),
            eos_token_ids=tuple(entry.get("eos_token_ids") or ()),
        )
        for entry in need_objects(parse_json(reply.body), "data")
    )


def _alias(entry: Mapping[str, Any]) -> PolicyRef | None:
    """The version that a name points to; None before its first activation."""
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
