"""Numbers about given tokens: log-probabilities, rows drawn again, and how far another policy is from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from trainer_client.data.arrays import host_array
from trainer_client.data.batch import RolloutBatch
from trainer_client.data.rollout import Rollout, Span
from trainer_client.data.versions import PolicyRef
from trainer_client.verbs.json_call import BINARY, Addressed, address, post, without_none
from trainer_client.wire.call import Call
from trainer_client.wire.encoding import json_body
from trainer_client.wire.parsing import Scored, parse_scored
from trainer_client.wire.pictures import travelling
from trainer_client.wire.replies import Reply, need, need_objects, parse_json

_PER_TOKEN = ("token_ids", "loss_mask", "logprobs", "sampling_logprobs", "log_kept_mass")


def logprobs(
    sequences: RolloutBatch | Sequence[Sequence[int] | np.ndarray | Mapping[str, Any]],
    *,
    policy: Addressed = "base",
    temperature: float = 1.0,
    returns: Sequence[str] = (),
    top_logprobs: int | None = None,
    versions: Sequence[Sequence[Span | Mapping[str, Any]] | None] | None = None,
) -> Call[Scored]:
    """Log-probabilities of given tokens under a policy, by teacher forcing.

    sequences    token ids each (lists, or any arrays), scored from position 0 (whose value is NaN); or `{"token_ids",
                 "start", "images"}`; or a batch, scored over its completions, so that the flat result lines up with
                 `batch.logprobs`
    temperature  divides the logits first
    returns      `entropy`
    versions     per sequence the spans to read it under instead of `policy`, or None; `batch.spans` checks rows that
                 switched on the way, each token under the version that sampled it, on the same KV"""
    entries = sequences.sequences if isinstance(sequences, RolloutBatch) else [_sequence(entry) for entry in sequences]
    if versions is not None:
        if len(versions) != len(entries):
            raise ValueError(f"There are {len(entries)} sequences, but versions for {len(versions)}.")
        entries = [
            entry if spans is None else {**entry, "versions": [_span(span) for span in spans]}
            for entry, spans in zip(entries, versions, strict=True)
        ]
    body = {"policy": address(policy), "sequences": entries, "temperature": temperature, "return": list(returns)}
    body |= without_none(top_logprobs=top_logprobs)
    return post("/v1/logprobs", body, parse_scored, headers=BINARY, idempotent=True)


def _sequence(entry: Sequence[int] | np.ndarray | Mapping[str, Any]) -> Mapping[str, Any]:
    return travelling(entry) if isinstance(entry, Mapping) else {"token_ids": entry}


def _span(span: Span | Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(span, Span):
        return span
    return {name: value for name, value in asdict(span).items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """One row drawn again."""

    exact: bool
    """Every sampled token came again."""
    first_difference: int | None
    """Index in `token_ids` of the first that did not."""
    margin: float | None
    """How far its uniforms would have had to move for it to come, or its logit where the row is greedy or the filters
    removed it. None also where it could not come at all."""
    max_abs_logprob_difference: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """The divergence of some tokens, with d = trainer − server and w = exp d; None where a value is too large."""

    tokens: int
    kl: float | None
    """mean(exp(d) − 1 − d), nats"""
    mean_ratio: float | None
    max_ratio: float | None
    ess: float | None
    """(Σw)² / (N·Σw²)"""
    max_abs_difference: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """The tokens that one version sampled."""

    version: PolicyRef
    tokens: int
    recorded: Divergence | None
    """Against what the rollouts carry; None where they carry nothing at this temperature."""
    rescored: Divergence
    """Against a teacher-forced pass of the server now."""


def replay(rollouts: RolloutBatch | Sequence[Rollout]) -> Call[tuple[Replayed, ...]]:
    """Draws rollouts again, token for token, on the versions that they name. Raises `VersionGone` where one of them was
    freed."""
    return _call("/v1/replay", {"rollouts": [_sent(row) for row in rollouts]}, _parse_replayed)


def probe(
    rollouts: RolloutBatch | Sequence[Rollout],
    trainer_logprobs: ArrayLike | Sequence[ArrayLike],
    *,
    temperature: float = 1.0,
) -> Call[tuple[Probed, ...]]:
    """How far the trainer's log-probabilities are from the server's, by version.

    trainer_logprobs  flat [N] in the order of `batch.token_ids`, or one array per row; NaN = masked
    temperature       what the trainer divided its logits by"""
    rows = list(rollouts)
    lengths = [len(row.token_ids) for row in rows]
    entries = [
        {**_sent(row), "trainer_logprobs": _values(values)}
        for row, values in zip(rows, _by_row(trainer_logprobs, lengths), strict=True)
    ]
    return _call("/v1/probe", {"rollouts": entries, "temperature": temperature}, _parse_probed)


def _call(path: str, body: Mapping[str, Any], parse: Any) -> Call[Any]:
    headers = {"content-type": "application/json"}
    return Call(method="POST", path=path, parse=parse, headers=headers, body=json_body(body), idempotent=True)


def _by_row(values: Any, lengths: Sequence[int]) -> Iterable[np.ndarray]:
    """One float array for each row."""
    parts: list[np.ndarray] = []
    if isinstance(values, Sequence) and not all(np.ndim(part) == 0 for part in values):
        parts = [host_array(part).astype(np.float64) for part in values]
    else:
        flat = host_array(values).astype(np.float64)
        if flat.shape != (sum(lengths),):
            raise ValueError(
                f"trainer_logprobs has the shape {list(flat.shape)}; a value for each of the {sum(lengths)} tokens is "
                "needed, in one flat array or one array per row."
            )
        parts = np.split(flat, np.cumsum(lengths)[:-1])
    if [part.shape for part in parts] != [(length,) for length in lengths]:
        shapes = [list(part.shape) for part in parts]
        raise ValueError(f"trainer_logprobs has arrays of shapes {shapes} for rows of {list(lengths)} tokens.")
    return parts


def _sent(row: Rollout) -> dict[str, Any]:
    """What of a row the server needs to read it again."""
    entry: dict[str, Any] = {"prompt_token_ids": row.prompt_token_ids.tolist()}
    if row.images:
        entry["images"] = list(row.images)
    for name in _PER_TOKEN:
        values = getattr(row, name)
        entry[name] = None if values is None else _values(values)
    spans = [asdict(span) for span in row.spans]
    return {**entry, "versions": spans, "seed": int(row.seed), "sampling": dict(row.sampling)}


def _values(values: np.ndarray) -> list[Any]:
    """NaN becomes null."""
    if values.dtype.kind != "f":
        return values.tolist()
    return [float(value) if np.isfinite(value) else None for value in values]


def _parse_replayed(reply: Reply) -> tuple[Replayed, ...]:
    return tuple(
        Replayed(
            exact=need(entry, "exact", bool),
            first_difference=entry.get("first_difference"),
            margin=entry.get("margin"),
            max_abs_logprob_difference=entry.get("max_abs_logprob_difference"),
        )
        for entry in need_objects(parse_json(reply.body), "rollouts")
    )


def _parse_probed(reply: Reply) -> tuple[Probed, ...]:
    return tuple(
        Probed(
            version=PolicyRef(need(entry, "policy", str), need(entry, "version", int), need(entry, "digest", str)),
            tokens=need(entry, "tokens", int),
            recorded=None if entry.get("recorded") is None else _divergence(need(entry, "recorded", dict)),
            rescored=_divergence(need(entry, "rescored", dict)),
        )
        for entry in need_objects(parse_json(reply.body), "versions")
    )


def _divergence(entry: Mapping[str, Any]) -> Divergence:
    numbers = ("kl", "mean_ratio", "max_ratio", "ess", "max_abs_difference")
    return Divergence(tokens=need(entry, "tokens", int), **{name: entry.get(name) for name in numbers})
