"""What can be wrong with an adapter, with its name, or with the room for it; for the caller to map to its own.

AdapterError
├── AdapterUnreadable    not an adapter file, or a configuration that says nothing usable
├── AdapterUnsupported   readable, but asks for something that is not served; `fields` names each
└── AdapterDoesNotFit    readable, but not for this base; `faults` holds one sentence for each fault

RegistryError            of names and versions
QuantisedBase            a version would unpack what is quantised
WeightsFull              the weights of all versions would take more than they may
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from adapters.faults import Fault, listed, summary

SHOWN_CHARACTERS = 160


class RegistryError(Exception):
    """Base of the tree. `message` is what the user reads."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class UnknownName(RegistryError):
    """Nothing was ever published under this name."""


class UnknownVersion(RegistryError):
    """The name exists, but never had this version, or none of its versions is live."""


class GoneVersion(RegistryError):
    """The version existed, but was freed."""


class LiveVersion(RegistryError):
    """The alias points to the version, so it cannot be deleted by itself."""


class Mismatch(RegistryError):
    """The alias is not where the caller expects it (If-Match); `at` is where it is: number and digest, if anywhere."""

    def __init__(self, message: str, at: tuple[int, str] | None = None) -> None:
        super().__init__(message)
        self.at = at


class QuantisedBase(Exception):
    """A version would unpack quantised layers, which was not allowed; `message` names them."""

    def __init__(self, paths: Sequence[str]) -> None:
        shown = ", ".join(paths[:4]) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")
        super().__init__(shown)
        self.message = (
            f"The base is quantised, and this version has parameters of its own for {shown}: with dequantize=true "
            "these layers are served unpacked, at their full size. Nothing changed."
        )


class WeightsFull(Exception):
    """The weights of all versions would take more than they may; `message` says how much."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class AdapterError(Exception):
    """Base of the tree. `message` is what the user reads."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class AdapterUnreadable(AdapterError):
    """`field` is what to mend: `weights`, `format`, `config`, or a field of the configuration as `config.r`."""

    def __init__(self, message: str, *, field: str = "config") -> None:
        super().__init__(message)
        self.field = field


class AdapterUnsupported(AdapterError):
    """`fields` names what is not served, as the configuration or the file spells it; `reasons` says why for each, with
    one sentence for several where that is the same."""

    def __init__(self, refusals: Mapping[str, str]) -> None:
        super().__init__(" ".join(dict.fromkeys(refusals.values())))
        self.fields = tuple(refusals)
        self.reasons = tuple(refusals.values())


class AdapterDoesNotFit(AdapterError):
    """Every fault at once: one sentence for each kind in the message, for each fault in `faults`. `remedy` is
    a sentence for all of them."""

    def __init__(self, faults: Sequence[Fault | str], remedy: str = "") -> None:
        every = [Fault(fault) if isinstance(fault, str) else fault for fault in faults]
        count = "1 fault" if len(every) == 1 else f"{len(every)} faults"
        super().__init__(f"The adapter does not fit the base; {count}: {summary(every)} {remedy}".rstrip())
        self.faults = listed(every)


def shown(value: object) -> str:
    """What a stranger called something, for an error sentence: printable, and cut when very long."""
    text = str(value)
    plain = text if text.isprintable() else ascii(text)
    return plain if len(plain) <= SHOWN_CHARACTERS else plain[: SHOWN_CHARACTERS - 1] + "…"
