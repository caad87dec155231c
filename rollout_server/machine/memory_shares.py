"""How models that share a device share its memory: weights first, as much room for versions and KV as each needs at the
least, and what is left in proportion to their weights. Plain arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rollout_server.errors import InvalidField
from rollout_server.machine.device_defaults import ADAPTERS, in_words

SHARE_OF_DEVICE = 2
"""One part in so many of the device is for models, where nobody says how much: most users train on the same one."""
VERSIONS_SHARE = 4
"""One part in so many of a model's room is for versions; the others are for keys and values."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What a model takes, in bytes."""

    name: str
    weights: int
    has_kv: bool
    """False for an encoder."""
    versions: int | None = None
    """What was given for versions; None: to be shared out, as is `kv`."""
    kv: int | None = None

    @property
    def least(self) -> int:
        """A model's weights, what was given for it, and a sixteenth of its weights for each of the rest."""
        rest = self.weights // ADAPTERS
        versions = rest if self.versions is None else self.versions
        return self.weights + versions + ((rest if self.kv is None else self.kv) if self.has_kv else 0)

    @property
    def grows(self) -> bool:
        """True where something of it was not given."""
        return self.versions is None or (self.has_kv and self.kv is None)


@dataclass(frozen=True, slots=True)
class Share:
    """What a model gets, in bytes."""

    memory: int
    """Weights, versions and KV together."""
    versions: int
    kv: int | None
    """None for a model without."""

    def sentence(self, claim: Claim) -> str:
        """What the log says of it."""
        kv = "" if self.kv is None else f", and {in_words(self.kv)} for keys and values"
        return f"{claim.name} has {in_words(claim.weights)} of weights, {in_words(self.versions)} for versions{kv}."


def share_out(memory: int, claims: Sequence[Claim]) -> list[Share]:
    """Raises `InvalidField` with the sum where the models do not fit."""
    needed = sum(claim.least for claim in claims)
    if needed > memory:
        listed = ", ".join(f"{claim.name} {in_words(claim.least)}" for claim in claims)
        raise InvalidField(
            f"The models need {in_words(needed)} together ({listed}: weights, and the least for versions, keys and "
            f"values), and --memory is {in_words(memory)}: give more, serve fewer models, or smaller ones.",
            param="memory",
        )
    growing = sum(claim.weights for claim in claims if claim.grows) or 1
    left = memory - needed
    return [_share(claim, claim.least + (left * claim.weights // growing if claim.grows else 0)) for claim in claims]


def _share(claim: Claim, memory: int) -> Share:
    room = memory - claim.weights
    if not claim.has_kv:
        return Share(memory, room if claim.versions is None else claim.versions, None)
    if claim.versions is not None:
        return Share(memory, claim.versions, room - claim.versions if claim.kv is None else claim.kv)
    if claim.kv is not None:
        return Share(memory, room - claim.kv, claim.kv)
    versions = max(claim.weights // ADAPTERS, room // VERSIONS_SHARE)
    return Share(memory, versions, room - versions)
