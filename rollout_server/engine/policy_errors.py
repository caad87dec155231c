"""What a change of versions may be refused with, in the words of the server's own errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from adapters.registry_errors import GoneVersion, LiveVersion, Mismatch, RegistryError
from adapters.resident import QuantisedBase, WeightsFull
from adapters.spec import AdapterDoesNotFit
from rollout_server.errors import (
    AdapterMismatch,
    Conflict,
    PreconditionFailed,
    UnknownPolicy,
    VersionGone,
    WeightsMemoryExceeded,
)


@contextmanager
def as_ours(name: str = "") -> Iterator[None]:
    """The adapters' own errors in the words of the one tree the server speaks; `name` is the policy's."""
    try:
        yield
    except GoneVersion as error:
        raise VersionGone(error.message, param="policy") from error
    except LiveVersion as error:
        raise Conflict(error.message, param="version") from error
    except Mismatch as error:
        at = None if error.at is None else (name, *error.at)
        raise PreconditionFailed(error.message, param="If-Match", at=at) from error
    except RegistryError as error:
        raise UnknownPolicy(error.message, param="policy") from error
    except AdapterDoesNotFit as error:
        raise AdapterMismatch(str(error), faults=error.faults) from error
    except QuantisedBase as error:
        raise Conflict(error.message, param="dequantize") from error
    except WeightsFull as error:
        raise WeightsMemoryExceeded(
            f"There is no memory for this version: {error.message}, and --weights-memory allows no more. Nothing "
            "changed; keep fewer versions (--keep-versions) or allow more."
        ) from error
