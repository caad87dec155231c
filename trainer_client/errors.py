"""Every error the client raises. It has a tree of its own, so that a trainer needs nothing of the server installed.

    TrainerClientError
    ├── ServerUnreachable       no reply: refused, reset, or silent for too long
    ├── BadReply                a reply that breaks the contract
    ├── DigestMismatch          the server holds other weights than were sent
    ├── NotSynced               rollouts of another version than expected
    └── ServerError             the server said no; one subclass per error code below
        ├── InvalidField        UnsupportedField · ContextExceeded · InvalidName (found here, before any request)
        ├── BadBody · BodyTooLarge · UnsupportedMedia · MethodNotAllowed
        ├── Unauthorized · Forbidden · NotFound
        ├── UnknownPolicy · VersionGone · StalePolicy · Conflict · PreconditionFailed
        ├── AdapterInvalid      AdapterMismatch (its `faults` lists every fault)
        ├── WeightsMemoryExceeded · QueueFull · NeverAdmitted
        └── EngineUnavailable · EngineFault (ReplicaLost, NonFiniteLogits, GrammarFault)

A code this client does not know is a plain `ServerError`. To add one: subclass, give it the code, list it in `_CODES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType


class TrainerClientError(Exception):
    """Base of the tree. `message` is a sentence for the user. Instances can be pickled."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ServerUnreachable(TrainerClientError):
    """No reply arrived. `sent` is false when the connection could not be made, so nothing can have happened."""

    def __init__(self, message: str, *, sent: bool = False, timed_out: bool = False) -> None:
        super().__init__(message)
        self.sent = sent
        self.timed_out = timed_out


class BadReply(TrainerClientError):
    """The reply is not what the contract promises: not JSON, a required field missing, lengths that differ."""


class DigestMismatch(TrainerClientError):
    """The digest computed here is not the one the server answered: tensors were lost or changed on the way."""


class NotSynced(TrainerClientError):
    """Some tokens were not sampled by the version the trainer expects. `row` is the first such row, if one is."""

    def __init__(self, message: str, *, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row


class ServerError(TrainerClientError):
    """The server answered with an error. `str()` gives its sentence."""

    code = "error"

    def __init__(
        self,
        message: str,
        *,
        status: int = 0,
        code: str | None = None,
        param: str | None = None,
        retryable: bool = False,
        faults: tuple[str, ...] = (),
        retry_after_s: float | None = None,
        policy: str | None = None,
        version: int | None = None,
        digest: str | None = None,
    ) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code
        self.status = status
        """HTTP status; 0 for an error line inside a stream."""
        self.param = param
        """The field it is about, if any."""
        self.retryable = retryable
        """True if the same call can succeed later."""
        self.faults = faults
        self.retry_after_s = retry_after_s
        """Seconds the server asks to wait."""
        self.policy = policy
        self.version = version
        self.digest = digest


class InvalidField(ServerError):
    code = "invalid_field"


class UnsupportedField(InvalidField):
    code = "unsupported_field"


class ContextExceeded(InvalidField):
    code = "context_length_exceeded"


class InvalidName(InvalidField, ValueError):
    """No policy can be called so: what the server would say, without asking it. Its `status` is 0."""


class BadBody(ServerError):
    code = "bad_body"


class BodyTooLarge(ServerError):
    code = "body_too_large"


class UnsupportedMedia(ServerError):
    code = "unsupported_media_type"


class Unauthorized(ServerError):
    code = "unauthorized"


class Forbidden(ServerError):
    code = "forbidden"


class NotFound(ServerError):
    code = "not_found"


class MethodNotAllowed(ServerError):
    code = "method_not_allowed"


class UnknownPolicy(ServerError):
    code = "unknown_policy"


class VersionGone(ServerError):
    code = "version_gone"


class StalePolicy(ServerError):
    code = "stale_policy"


class Conflict(ServerError):
    code = "conflict"


class PreconditionFailed(ServerError):
    code = "precondition_failed"


class AdapterInvalid(ServerError):
    code = "adapter_invalid"


class AdapterMismatch(AdapterInvalid):
    code = "adapter_mismatch"


class WeightsMemoryExceeded(ServerError):
    code = "weights_memory_exceeded"


class StorageFailed(ServerError):
    code = "storage_failed"


class QueueFull(ServerError):
    code = "queue_full"


class NeverAdmitted(ServerError):
    code = "never_admitted"


class EngineUnavailable(ServerError):
    code = "engine_unavailable"


class EngineFault(ServerError):
    code = "engine_fault"


class ReplicaLost(EngineFault):
    """Several engines of a fleet ended under this row, or it cannot be drawn again."""

    code = "replica_lost"


class NonFiniteLogits(EngineFault):
    code = "non_finite_logits"


class GrammarFault(EngineFault):
    """The grammar of a row met a limit of the server's: what it has is returned."""

    code = "grammar_fault"


_CODES: Mapping[str, type[ServerError]] = MappingProxyType(
    {
        kind.code: kind
        for kind in (
            ServerError,
            InvalidField,
            UnsupportedField,
            ContextExceeded,
            BadBody,
            BodyTooLarge,
            UnsupportedMedia,
            Unauthorized,
            Forbidden,
            NotFound,
            MethodNotAllowed,
            UnknownPolicy,
            VersionGone,
            StalePolicy,
            Conflict,
            PreconditionFailed,
            AdapterInvalid,
            AdapterMismatch,
            WeightsMemoryExceeded,
            StorageFailed,
            QueueFull,
            NeverAdmitted,
            EngineUnavailable,
            EngineFault,
            ReplicaLost,
            NonFiniteLogits,
            GrammarFault,
        )
    }
)


def error_class(code: str | None) -> type[ServerError]:
    """The class of an error code; `ServerError` for one this client does not know."""
    return _CODES.get(code or "", ServerError)
