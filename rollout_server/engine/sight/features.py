"""What a tower made of pictures, kept for whoever shows one of them again. It takes what KV leaves, as the prefix cache
does, and gives way at once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from rollout_server.engine.blame import Blame
from rollout_server.engine.messages.status import PictureStatus
from rollout_server.engine.sight.seen import View
from rollout_server.engine.sight.sight import Sight, sight_of
from rollout_server.models.vision.family import Features, VisionFamily
from rollout_server.text.pictures.picture import Picture
from rollout_server.text.pictures.reader import PictureReader

SHARE = 8
"""At most one part in so many of the KV memory."""


@dataclass(frozen=True, slots=True)
class Ahead:
    """What the tower read for what is read next."""

    pictures: int
    tokens: int
    """Their placeholders."""
    complete: bool
    """Nothing that is read next waits for the tower."""


class Eyes:
    """The tower of the resident base. `cell_bytes` is what a KV column takes; features have the `dtype` of the
    decoder's activations. Beside what is about to be read it keeps nothing before `fit` has said how much it may."""

    def __init__(
        self, family: VisionFamily, dtype: mx.Dtype, cell_bytes: int, reader: PictureReader | None = None
    ) -> None:
        self.family = family
        self.reader = reader
        """What makes pixels of files, on the event loop's side; None where nothing says how."""
        self.blame = Blame()
        """Which picture the tower was reading when something was raised; the engine's own."""
        self._dtype = dtype
        self._cell_bytes = cell_bytes
        self._kept: OrderedDict[str, Features] = OrderedDict()
        self._ahead: set[str] = set()
        """Digests of those that were read for somebody who has not come to them yet."""
        self._awaited: dict[str, set[str]] = {}
        """Digests of what is read next, by who reads: they stay."""
        self._limit = 0
        self.nbytes = 0
        self.looked = self.hits = 0
        """Pictures that the tower read, and how often one was there already when its first placeholder was read."""

    def sight(self, tokens: Sequence[int], pictures: Sequence[Picture]) -> Sight | None:
        """Where pictures stand among tokens; None without pictures. Raises `InvalidField` where they do not fit."""
        return sight_of(tokens, pictures, self.family, self.look) if pictures else None

    @property
    def status(self) -> PictureStatus:
        return PictureStatus(len(self._kept), self.looked, self.hits)

    @property
    def cells(self) -> int:
        """KV columns whose place is taken by what gives way at once."""
        return -(-sum(self._kept[digest].nbytes for digest in self._spare) // self._cell_bytes)

    @property
    def awaited_cells(self) -> int:
        """KV columns whose place is taken by what is about to be read."""
        return -(-self.nbytes // self._cell_bytes) - self.cells

    def fit(self, cells: int) -> None:
        """What gives way fills at most the place of so many KV columns from now on."""
        self._limit = cells * self._cell_bytes
        self._evict()

    def look(self, picture: Picture, begins: bool = False) -> Features:
        """The features of a picture, evaluated. `begins`: its first placeholder is what is read."""
        digest = picture.digest
        found = self._kept.get(digest)
        if begins:
            self.hits += found is not None and digest not in self._ahead
            self._ahead.discard(digest)
        if found is not None:
            self._kept.move_to_end(digest)
            return found
        with self.blame(picture):
            found = self._features(picture)
        self.looked += 1
        self._kept[digest] = found
        self.nbytes += found.nbytes
        self._evict()
        return found

    def _features(self, picture: Picture) -> Features:
        pixels = np.frombuffer(picture.pixels, "<f4").reshape(picture.shape)
        made = self.family.features(mx.array(pixels), picture.grid)
        found = Features(
            made.embeddings.astype(self._dtype), tuple(each.astype(self._dtype) for each in made.deepstack)
        )
        mx.eval(found.embeddings, found.deepstack)
        return found

    def look_ahead(self, reader: str, views: Iterable[View], tokens: int, most: int | None = None) -> Ahead:
        """Looks at the pictures among the first `tokens` tokens of all views together, so that whoever reads these
        waits for no tower; with `most` at no more than so many new ones, and among as many of each view, since any may
        be read first. What was looked at stays until the same `reader` looks again, or has nothing to read."""
        before, placeholders, complete = self.looked, 0, True
        awaited = self._awaited[reader] = set()
        for picture, first in _pictures_in(views, tokens, each=most is not None):
            awaited.add(picture.digest)
            if picture.digest not in self._kept and most is not None and self.looked - before >= most:
                complete = False
                continue
            known = self.looked
            self.look(picture)
            if self.looked > known:
                placeholders += picture.tokens
                if first:
                    self._ahead.add(picture.digest)
        self._evict()
        return Ahead(self.looked - before, placeholders, complete)

    def rest(self, reader: str) -> None:
        """The reader has nothing to read: what was looked at for it is kept as far as there is room."""
        if self._awaited.pop(reader, None):
            self._evict()

    def clear(self) -> int:
        """Forgets everything; returns how many bytes that were."""
        freed, self.nbytes = self.nbytes, 0
        self._kept.clear()
        self._ahead.clear()
        self._awaited.clear()
        return freed

    @property
    def _spare(self) -> list[str]:
        """Digests of those that may go, the one that was looked at longest ago first."""
        awaited = set().union(*self._awaited.values())
        return [digest for digest in self._kept if digest not in awaited]

    def _evict(self) -> None:
        spare = self._spare
        nbytes = sum(self._kept[digest].nbytes for digest in spare)
        for digest in spare:
            if nbytes <= self._limit:
                return
            gone = self._kept.pop(digest)
            self._ahead.discard(digest)
            self.nbytes -= gone.nbytes
            nbytes -= gone.nbytes


def _pictures_in(views: Iterable[View], tokens: int, *, each: bool) -> Iterator[tuple[Picture, bool]]:
    """Pictures among the first `tokens` tokens of each view, or of all together; True with those that begin there."""
    for sight, begin, count in views:
        if tokens <= 0:
            return
        for picture, first, *_ in sight.shown(begin, min(count, tokens)) if sight is not None else ():
            yield picture, first == 0
        tokens -= 0 if each else count
