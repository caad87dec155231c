"""Where the pictures of one sequence stand among its tokens. Whoever reads these tokens again needs the same: ids alone
do not say which picture a placeholder stands for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from rollout_server.errors import InvalidField
from rollout_server.quoting import counted
from rollout_server.text.pictures.picture import Picture

if TYPE_CHECKING:
    from rollout_server.models.vision.family import Features, VisionFamily


@dataclass(frozen=True, slots=True, eq=False)
class Sight:
    """What is known of the tokens up to the last picture's end. Behind it a placeholder is text, since a model may
    sample one."""

    pictures: tuple[Picture, ...]
    columns: np.ndarray
    """int64 [placeholders], ascending."""
    first: tuple[int, ...]
    """The index in `columns` of each picture's first placeholder, and their number at the end."""
    key: tuple[int, ...]
    """The tokens, each placeholder replaced by a number that only this picture has, above the vocabulary."""
    turns: np.ndarray | None
    """int32 [3, tokens]: rotary positions; None where a token's position is its column."""
    delta: int
    """The position of a token behind the pictures, less its column."""
    sees_both_ways: bool
    """The tokens of one picture see each other, and are read in one chunk."""
    look: Callable[[Picture, bool], Features]
    """What the tower makes of a picture; True where its first placeholder is what is read."""

    @property
    def end(self) -> int:
        """The column behind the last placeholder."""
        return len(self.key)

    def shows(self, pictures: Collection[Picture]) -> bool:
        """Returns whether one of these pictures stands among the tokens."""
        return any(shown.digest == picture.digest for shown in self.pictures for picture in pictures)

    def key_of(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """Tokens that begin with those it was made of, or their beginning, by what they mean: those of two pictures
        differ."""
        return self.key[: len(tokens)] + tuple(tokens[self.end :])

    def positions(self, at: int, count: int) -> np.ndarray:
        """int32 [3, count]: rotary positions of the tokens from column `at` on."""
        behind = np.broadcast_to(np.arange(at, at + count, dtype=np.int32) + self.delta, (3, count))
        if self.turns is None or at >= self.end:
            return behind
        own = self.turns[:, at : at + count]
        return np.concatenate([own, behind[:, own.shape[1] :]], axis=1)

    def chunk(self, at: int, count: int) -> int:
        """How many tokens are read from column `at` on where `count` are to be: some more, if the last would stand
        within a picture that is read in one chunk."""
        found = self._around(at + count)
        return count if found is None else found[1] - at

    def before(self, column: int) -> int:
        """The last column up to this one that may begin a chunk."""
        found = self._around(column)
        return column if found is None else found[0]

    def _around(self, column: int) -> tuple[int, int] | None:
        """The columns of the picture within which this one begins a chunk that may not begin there."""
        if not self.sees_both_ways or column >= self.end:
            return None
        return next(((begin, end) for begin, end in self.extents if begin < column < end), None)

    @property
    def extents(self) -> list[tuple[int, int]]:
        """The first column of each picture, and the one behind its last."""
        pairs = zip(self.first, self.first[1:], strict=False)
        return [(int(self.columns[begin]), int(self.columns[end - 1]) + 1) for begin, end in pairs]

    def blocks(self, at: int, count: int) -> np.ndarray:
        """int32 [2, count]: from which column, and up to which (excluded), each token sees besides what stands before
        it; nothing outside of pictures."""
        found = np.zeros((2, count), dtype=np.int32)
        for begin, end in self.extents if self.sees_both_ways else ():
            found[0, max(0, begin - at) : max(0, end - at)] = begin
            found[1, max(0, begin - at) : max(0, end - at)] = end
        return found

    def shown(self, at: int, count: int) -> list[tuple[Picture, int, int, np.ndarray]]:
        """Pictures with placeholders among the tokens from column `at` on: which of their placeholders, from and to,
        and their columns."""
        low, high = (int(place) for place in np.searchsorted(self.columns, [at, at + count]))
        found = []
        for picture, begin, end in zip(self.pictures, self.first, self.first[1:], strict=False):
            if (start := max(begin, low)) < (stop := min(end, high)):
                found.append((picture, start - begin, stop - begin, self.columns[start:stop]))
        return found


def sight_of(
    tokens: Sequence[int], pictures: Sequence[Picture], family: VisionFamily, look: Callable[[Picture, bool], Features]
) -> Sight:
    """Placeholders belong to the pictures in their order. Raises `InvalidField` where they are too few, or do not stand
    as those of such pictures do."""
    counts = [family.tokens(picture.grid) for picture in pictures]
    columns = np.flatnonzero(np.asarray(tokens) == family.placeholder)[: sum(counts)]
    if len(columns) < sum(counts):
        raise InvalidField(
            f"The pictures need {counted(sum(counts), 'placeholder')} (token {family.placeholder}), and the sequence "
            f"has {len(columns)}: give the expanded ids that a reply returns, or messages.",
            param="images",
        )
    end = int(columns[-1]) + 1
    first = tuple(accumulate(counts, initial=0))
    key = list(tokens[:end])
    for picture, begin, stop in zip(pictures, first, first[1:], strict=False):
        number = _number_of(picture)
        for column in columns[begin:stop]:
            key[column] = number
    try:
        turns = family.positions(tokens[:end], [picture.grid for picture in pictures])
    except ValueError as error:
        raise InvalidField(f"The placeholders do not fit their pictures: {error}.", param="images") from error
    delta = 0 if turns is None else int(turns.max()) + 1 - end
    found = Sight(tuple(pictures), columns, first, tuple(key), turns, delta, family.sees_both_ways, look)
    if family.sees_both_ways and any(
        stop - begin != count for (begin, stop), count in zip(found.extents, counts, strict=True)
    ):
        raise InvalidField("The placeholders of a picture do not stand together in the ids.", param="images")
    return found


def _number_of(picture: Picture) -> int:
    """All of the digest, so that two pictures never have one number; above every vocabulary."""
    return 2**64 + int.from_bytes(picture.digest.encode(), "big")
