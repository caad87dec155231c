"""What the registry of versions refuses."""

from __future__ import annotations


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
