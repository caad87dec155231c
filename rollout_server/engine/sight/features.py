"""What a tower made of pictures, kept for whoever shows one of them again. It takes what KV leaves, as the prefix cache
does, and gives way at once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

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


class Eyes:
    """The tower of the resident base. `cell_bytes` is what a KV column takes; features have the `dtype` of the
    decoder's activations. It keeps nothing before `fit` has said how much it may, but for the last picture."""

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
        """KV columns whose place it takes."""
        return -(-self.nbytes // self._cell_bytes)

    def fit(self, cells: int) -> None:
        """Fills at most the place of so many KV columns from now on."""
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

    def look_ahead(self, views: Iterable[View], tokens: int) -> int:
        """Looks at the pictures among the first `tokens` tokens of all views together, so that whoever reads these
        waits for no tower; returns at how many."""
        before = self.looked
        for sight, begin, count in views:
            if tokens <= 0:
                break
            for picture, first, *_ in sight.shown(begin, min(count, tokens)) if sight is not None else ():
                known = self.looked
                self.look(picture)
                if first == 0 and self.looked > known:
                    self._ahead.add(picture.digest)
            tokens -= count
        return self.looked - before

    def clear(self) -> int:
        """Forgets everything; returns how many bytes that were."""
        freed, self.nbytes = self.nbytes, 0
        self._kept.clear()
        self._ahead.clear()
        return freed

    def _evict(self) -> None:
        while self.nbytes > self._limit and len(self._kept) > 1:
            digest, gone = self._kept.popitem(last=False)
            self._ahead.discard(digest)
            self.nbytes -= gone.nbytes
