"""Pictures that were made ready, kept for requests that show them again: trainers repeat their prompts, and a
conversation shows its pictures in every turn."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock

from rollout_server.text.pictures.picture import Picture


class KeptPictures:
    """Pictures of one model's processor, by what their files hold; on any thread. Those that were asked for last stay,
    as far as their pixels fill at most `most` bytes."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = Lock()
        self._kept: OrderedDict[bytes, Picture] = OrderedDict()
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        """What their pixels fill."""
        return self._nbytes

    def get(self, key: bytes, make: Callable[[], Picture]) -> Picture:
        """The picture that is kept under the digest of its file, or else what `make` gives. Two threads that miss one
        at once both make it, and wait for nobody."""
        with self._lock:
            if (found := self._kept.get(key)) is not None:
                self._kept.move_to_end(key)
                return found
        made = make()
        with self._lock:
            if key not in self._kept and len(made.pixels) <= self._most:
                self._kept[key] = made
                self._nbytes += len(made.pixels)
            while self._nbytes > self._most:
                _, gone = self._kept.popitem(last=False)
                self._nbytes -= len(gone.pixels)
        return made
