"""What the registry of versions, and the device that holds them, refuse."""

from __future__ import annotations

from collections.abc import Sequence


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
