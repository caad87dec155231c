"""A prompt on its way into the KV cache, as every part of the engine knows it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rollout_server.engine.sight.sight import Sight


@dataclass(slots=True, eq=False)
class Prompt:
    """A prompt on its way into the cache. Its last token is not among `tokens`: it is the first decode step's input."""

    tokens: tuple[int, ...]
    slot: Any
    """What its KV is computed under, as `route` takes it: an adapter slot, or where sets are read apart a placement."""
    prefilled: int = 0
    places: list[int] = field(default_factory=list)
    """Places reserved for its rows; the first one is prefilled, the others copied from it."""
    kept: list[Any] | None = None
    """Its KV apart from any place: of a row that moves, or for whoever joins later and cannot have it from a place."""
    looked_up: bool = False
    """Whatever there was of it from before is in its place."""
    stops: tuple[int, ...] = ()
    """Numbers of tokens, the fewest first, behind which reading stops, since the state there is to be kept."""
    owner: object = None
    """Whose samples begin with it: a place that one of them has left still holds it."""
    sight: Sight | None = None
    """Where its pictures stand; None without any."""

    @property
    def key(self) -> tuple[int, ...]:
        """What its KV is known by: its tokens, and which pictures they stand for."""
        return self.tokens if self.sight is None else self.sight.key_of(self.tokens)

    def chunk(self, count: int) -> int:
        """How many tokens are read next where about `count` are to be."""
        left = len(self.tokens) - self.prefilled
        return count if self.sight is None else min(self.sight.chunk(self.prefilled, count), left)

    @property
    def ahead(self) -> int:
        """Tokens up to where reading stops next."""
        return next((stop for stop in self.stops if stop > self.prefilled), len(self.tokens)) - self.prefilled

    @property
    def done(self) -> bool:
        return self.prefilled == len(self.tokens)
