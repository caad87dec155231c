"""A prompt's `prefix` → the engine's noun, and what can be wrong with one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rollout_server.engine.messages.spans import gap_fault
from rollout_server.errors import ContextExceeded, InvalidField
from rollout_server.http.service import Service
from rollout_server.quoting import counted, quoted
from rollout_server.rollout import GivenSpan, Prefix
from rollout_server.schemas.rollouts import PrefixFields


def read_prefix(given: PrefixFields, place: str, service: Service) -> Prefix:
    """`place` is where it stands in the request."""
    count = len(given.token_ids)
    service.check_ids(given.token_ids, f"{place}.token_ids")
    for name in ("logprobs", "sampling_logprobs", "loss_mask"):
        values: Sequence[float | None] | None = getattr(given, name)
        if values is not None and len(values) != count:
            raise InvalidField(
                f"{place}.{name} has {counted(len(values), 'value')} for {counted(count, 'token')}.",
                param=f"{place}.{name}",
            )
    if given.versions is not None and (fault := gap_fault(given.versions, count)):
        raise InvalidField(f"{place}.versions do not fit its tokens: {fault}.", param=f"{place}.versions")
    return Prefix(
        tuple(given.token_ids),
        _numbers(given.logprobs, count),
        _numbers(given.sampling_logprobs, count),
        tuple(given.loss_mask) if given.loss_mask is not None else (0,) * count,
        _spans(given, count),
    )


def _numbers(values: Sequence[float | None] | None, count: int) -> tuple[float, ...]:
    if values is None:
        return (math.nan,) * count
    return tuple(math.nan if value is None else value for value in values)


def _spans(given: PrefixFields, count: int) -> tuple[GivenSpan, ...]:
    if given.versions is None:
        return (GivenSpan(None, None, None, None, 0, count),) if count else ()
    return tuple(
        GivenSpan(span.policy, span.version, span.digest, span.label, span.start, span.end) for span in given.versions
    )


def no_room(prefix: Prefix, max_tokens: int, *, asked: bool, place: str, param: str) -> InvalidField | ContextExceeded:
    """The error for a prefix that leaves nothing to sample. `asked`: max_tokens was given, in `param`; else it is what
    fits."""
    held = counted(len(prefix), "token")
    if asked:
        return InvalidField(
            f"{param} is {quoted(max_tokens)} and counts the prefix, which has {held} already: it must be larger.",
            param=param,
        )
    return ContextExceeded(
        f"{place} has {held}; behind the prompt the context holds {max_tokens}, the new tokens included.", param=place
    )
