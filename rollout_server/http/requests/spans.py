"""Under which versions given tokens are to be read."""

from __future__ import annotations

from typing import Any

from litestar import Request

from rollout_server.engine.messages.spans import tiling_fault
from rollout_server.errors import InvalidField, UnknownPolicy
from rollout_server.http.service import Service
from rollout_server.rollout import SpanAddress
from rollout_server.schemas.logprobs import SequenceToScore
from rollout_server.schemas.spans import SpanToRead


def read_spans(
    sequence: SequenceToScore, place: str, request: Request[Any, Any, Any], service: Service
) -> tuple[SpanAddress, ...] | None:
    """The spans of a sequence, checked but for whether their versions are there."""
    if sequence.versions is None:
        return None
    spans = tuple(
        read_span(span, f"{place}.versions[{index}]", request, service) for index, span in enumerate(sequence.versions)
    )
    if fault := tiling_fault(spans, len(sequence.token_ids) - sequence.start):
        raise InvalidField(f"{place}.versions do not fit the sequence: {fault}.", param=f"{place}.versions")
    return spans


def read_span(span: SpanToRead, place: str, request: Request[Any, Any, Any], service: Service) -> SpanAddress:
    if span.policy is None:
        raise UnknownPolicy(f"{place} names no policy, so its tokens cannot be read again.", param=f"{place}.policy")
    if span.version is None and span.digest is None:
        raise InvalidField(f"{place} names no version: give its number or its digest.", param=f"{place}.version")
    which = span.digest if span.version is None else span.version
    address = service.address(f"{span.policy}@{which}", request, param=f"{place}.policy")
    return SpanAddress(address, span.start, span.end, span.digest, span.kv)
