"""Numbers about given tokens: log-probabilities, rows drawn again, and how far another policy is from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from trainer_client.batch import RolloutBatch
from trainer_client.call import Call
from trainer_client.parsing import (
    Scored,
    parse_scored,
)
from trainer_client.rollout import Span
from trainer_client.verbs.json_call import BINARY, Addressed, address, post, without_none


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
                 "start"}`; or a batch, scored over its completions, so that the flat result lines up with
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
    return entry if isinstance(entry, Mapping) else {"token_ids": entry}


def _span(span: Span | Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(span, Span):
        return span
    return {name: value for name, value in asdict(span).items() if value is not None}
