"""Every error a user can meet.

Each class has a stable `code` (part of the public contract), says whether the same call can succeed later
(`retryable`), and may name the offending field (`param`). HTTP status codes live in `http/problems.py`, not here.
To add one: subclass `RolloutError`, give it a code, add a row to the status table; a test checks that none is missing.

    RolloutError
    ├── InvalidField            a value is wrong                      invalid_field
    │   ├── UnsupportedField    a field or value we do not serve      unsupported_field
    │   └── ContextExceeded     prompt + max_tokens do not fit        context_length_exceeded
    ├── BadBody                 not JSON, not multipart, truncated    bad_body
    ├── BodyTooLarge            over a byte limit                     body_too_large
    ├── UnsupportedMedia        content type                          unsupported_media_type
    ├── Unauthorized / Forbidden                                      unauthorized / forbidden
    ├── NotFound                no such route or object               not_found
    ├── MethodNotAllowed        the route has other methods           method_not_allowed
    ├── UnknownPolicy           no such name or version               unknown_policy
    ├── VersionGone             existed, but was freed                version_gone
    ├── StalePolicy             alias older than min_version          stale_policy
    ├── Conflict                an id is already in use               conflict
    ├── PreconditionFailed      If-Match                              precondition_failed
    ├── AdapterInvalid          not a readable adapter                adapter_invalid
    │   └── AdapterMismatch     does not fit the base; lists all      adapter_mismatch
    ├── WeightsMemoryExceeded   no room for another version           weights_memory_exceeded
    ├── StorageFailed           the state directory                   storage_failed
    ├── QueueFull               too many requests waiting             queue_full
    ├── NeverAdmitted           deadline passed in the queue          never_admitted
    ├── EngineUnavailable       starting, stopping or dead            engine_unavailable
    │   └── EngineEnded         the same; a fleet asks another        engine_unavailable
    └── EngineFault             a step failed                         engine_fault
        ├── ReplicaLost         engines ended under a row             replica_lost
        ├── NonFiniteLogits     the model produced NaN or infinity    non_finite_logits
        └── GrammarFault        a row's grammar met a limit           grammar_fault
"""

from __future__ import annotations

from collections.abc import Sequence


class RolloutError(Exception):
    """Base of the tree. `message` is one sentence for the user; `param` is the field it is about, if any."""

    code = "error"
    retryable = False

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidField(RolloutError):
    code = "invalid_field"


class UnsupportedField(InvalidField):
    code = "unsupported_field"


class ContextExceeded(InvalidField):
    code = "context_length_exceeded"


class BadBody(RolloutError):
    code = "bad_body"


class BodyTooLarge(RolloutError):
    code = "body_too_large"


class UnsupportedMedia(RolloutError):
    code = "unsupported_media_type"


class Unauthorized(RolloutError):
    code = "unauthorized"


class Forbidden(RolloutError):
    code = "forbidden"


class NotFound(RolloutError):
    code = "not_found"


class MethodNotAllowed(RolloutError):
    code = "method_not_allowed"


class UnknownPolicy(RolloutError):
    code = "unknown_policy"


class VersionGone(RolloutError):
    code = "version_gone"


class StalePolicy(RolloutError):
    code = "stale_policy"
    retryable = True


class Conflict(RolloutError):
    code = "conflict"


class PreconditionFailed(RolloutError):
    """`at` is where the alias is: name, version and digest, if anywhere."""

    code = "precondition_failed"

    def __init__(self, message: str, *, param: str | None = None, at: tuple[str, int, str] | None = None) -> None:
        super().__init__(message, param=param)
        self.at = at


class AdapterInvalid(RolloutError):
    """The upload is not an adapter this server can read."""

    code = "adapter_invalid"


class AdapterMismatch(AdapterInvalid):
    """The adapter does not fit the base. `faults` holds one sentence for every fault found, all at once."""

    code = "adapter_mismatch"

    def __init__(self, message: str, *, faults: Sequence[str], param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.faults = tuple(faults)


class WeightsMemoryExceeded(RolloutError):
    code = "weights_memory_exceeded"


class StorageFailed(RolloutError):
    """A change could not be made durable, so it was not made live."""

    code = "storage_failed"


class QueueFull(RolloutError):
    """`retry_after_s` is a hint in seconds, sent as `Retry-After`."""

    code = "queue_full"
    retryable = True

    def __init__(self, message: str, *, retry_after_s: float = 1.0, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s


class NeverAdmitted(RolloutError):
    code = "never_admitted"
    retryable = True


class EngineUnavailable(RolloutError):
    code = "engine_unavailable"
    retryable = True


class EngineEnded(EngineUnavailable):
    """The last word of an engine that dies or is told to stop. In a fleet nobody hears it: what it is about is done
    again by another engine. To a client it is its parent."""


class EngineFault(RolloutError):
    code = "engine_fault"
    retryable = True


class ReplicaLost(EngineFault):
    """Several replicas ended while they computed this row, or it cannot be computed again."""

    code = "replica_lost"


class NonFiniteLogits(EngineFault):
    code = "non_finite_logits"
    retryable = False


class GrammarFault(EngineFault):
    code = "grammar_fault"
    retryable = False
