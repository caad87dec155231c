"""What the adapters refuse, in the words of the server's own tree of errors; translated here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from adapters.errors import (
    AdapterDoesNotFit,
    AdapterError,
    AdapterUnreadable,
    AdapterUnsupported,
    GoneVersion,
    LiveVersion,
    Mismatch,
    QuantisedBase,
    RegistryError,
    WeightsFull,
)
from rollout_server.errors import (
    AdapterInvalid,
    AdapterMismatch,
    Conflict,
    PreconditionFailed,
    RolloutError,
    UnknownPolicy,
    UnsupportedField,
    VersionGone,
    WeightsMemoryExceeded,
)


@contextmanager
def as_ours(name: str = "") -> Iterator[None]:
    """Whatever the adapters refuse in here is raised as the server's own; `name` is the policy's."""
    try:
        yield
    except AdapterError as error:
        raise from_adapters(error) from error
    except (RegistryError, QuantisedBase, WeightsFull) as error:
        raise _of_versions(error, name) from error


def from_adapters(error: AdapterError) -> RolloutError:
    """What is wrong with an adapter itself."""
    message = str(error)
    match error:
        case AdapterDoesNotFit():
            return AdapterMismatch(message, faults=error.faults, param="weights")
        case AdapterUnsupported():
            return UnsupportedField(message, param=f"config.{error.fields[0]}" if error.fields else "config")
        case AdapterUnreadable():
            return AdapterInvalid(message, param=error.field)
    return AdapterInvalid(message)


def _of_versions(error: RegistryError | QuantisedBase | WeightsFull, name: str) -> RolloutError:
    """What a change of versions may be refused with."""
    match error:
        case GoneVersion():
            return VersionGone(error.message, param="policy")
        case LiveVersion():
            return Conflict(error.message, param="version")
        case Mismatch():
            at = None if error.at is None else (name, *error.at)
            return PreconditionFailed(error.message, param="If-Match", at=at)
        case QuantisedBase():
            return Conflict(error.message, param="dequantize")
        case WeightsFull():
            return WeightsMemoryExceeded(
                f"There is no memory for this version: {error.message}, and --weights-memory allows no more. Nothing "
                "changed; keep fewer versions (--keep-versions) or allow more."
            )
    return UnknownPolicy(error.message, param="policy")
