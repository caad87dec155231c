"""What a batch needs of the KV memory of its rows, whatever kind it is of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import mlx.core as mx

from rollout_server.engine.kv_cache.prompt import Prompt
from rollout_server.engine.sight.seen import Seen
from rollout_server.engine.sight.sight import Sight

Forward = Callable[[mx.array, list[Any]], mx.array]
"""(tokens int32 [B, N], one cache per layer) → logits [B, N, V]."""


class Reading(Protocol):
    """A `Forward` that may be given what it sees of pictures; where it sees none it is called as one."""

    def __call__(self, tokens: mx.array, caches: list[Any], seen: Seen | None = None, /) -> mx.array: ...


class Seating(NamedTuple):
    """A prompt that was read, and how many rows of it sit down now; `keep` if more of them will later."""

    prompt: Prompt
    rows: int
    keep: bool = False


class KVStore(Protocol):
    """Places index the batch dimension of a decode step."""

    layers: list[Any]
    capacity: int
    cuts: bool
    """A row's place holds its prompt's KV for as long as nobody else takes it, so that none need be kept beside it."""

    @property
    def steps_overlap(self) -> bool:
        """True if a step may be dispatched while the one before still runs, and nothing is copied that it reads."""

    def places(self, rows: int) -> int:
        """How many places, padded ones included, a step of `rows` rows computes."""

    def step_places(self, last: int) -> int:
        """How many places, from the first on, a decode step computes whose last row sits at place `last`. Those that
        are reserved behind it for prompts on their way are left out where that is worth while."""

    def cells(self, count: int, columns: int) -> int:
        """Rows × columns that the cache may fill once `count` more rows joined and none is longer than `columns`."""

    def cells_after_step(self, width: int) -> int:
        """KV cells that are allocated after a step that reads `width` columns."""

    def minimum_cells(self, rows: int, width: int) -> int:
        """KV cells that exactly `rows` rows need after a step that reads `width` columns."""

    def may_grow_to(self, width: int, cells: int) -> None:
        """Lets arrays that have to grow for a step of `width` columns grow beyond that, up to `cells` rows × columns:
        they are seldom copied then."""

    def begin(self, prompt: Prompt, count: int, columns: int) -> None:
        """Reserves room for `count` rows of a prompt; no running row will be longer than `columns`. The prompt counts
        as read where a free place still holds it."""

    def cancel(self, prompt: Prompt, count: int) -> None:
        """Forgets a prompt that was begun for `count` rows and never seated; its places are left separately."""

    def prefill(
        self, forward: Reading, chunks: Sequence[tuple[Prompt, int]], route: Callable[[list[int]], None]
    ) -> None:
        """Runs the next `n` tokens of each prompt through the model and evaluates only the KV."""

    def inherit(self, prompt: Prompt, donor: Any, place: int) -> None:
        """Copies a prompt that has begun from a place of a store of the same kind which begins with it."""

    def remember(self, places: dict[int, object]) -> None:
        """Places that are about to be left, and whose prompt each of them holds."""

    def seat(self, seatings: Sequence[Seating]) -> list[list[int]]:
        """Places of the rows of each, which hold their prompt's KV."""

    def set_positions(self, offsets: Sequence[int | None], width: int, deltas: Sequence[int] | None = None) -> None:
        """Sets where the next decode step, of so many of the first places, writes (column `offsets[place]`; None: the
        place takes no part) and how many columns it reads. `deltas` are added to the columns for what turns queries
        and keys; None where all are 0, as they are without pictures."""

    def pending(self) -> list[Any]:
        """Arrays that a step changes without its tokens depending on them; evaluated together with the tokens."""

    def copy(self, place: int, length: int) -> list[Any]:
        """The KV of the first `length` tokens of a place, as `Prompt.kept` has it; evaluated."""

    def leave(self, places: Sequence[int], scrub: Sequence[int]) -> dict[int, int] | None:
        """Frees places, zeroing those in `scrub`; returns old → new places if rows moved. No step may be in flight
        for rows that move; see `moves_on_leave`."""

    def moves_on_leave(self, leaving: int) -> bool:
        """Returns whether freeing `leaving` places now would move the rows that stay."""

    def shrink(self, columns: int) -> dict[int, int] | None:
        """Gives back what rows of at most `columns` do not need; as `leave`. No step may be in flight."""

    @property
    def nbytes(self) -> int: ...

    @property
    def allocated_cells(self) -> int:
        """Rows × columns that are allocated though no row is there."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of one place, the first of them at column `at`, and what `route` needs to know of it."""

    place: int
    at: int
    tokens: tuple[int, ...]
    slot: Any
    sight: Sight | None = None
    """The pictures of what the tokens are part of."""
