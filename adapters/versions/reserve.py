"""Room that is kept on a disk to be given up when there is no other: without it, what frees room could not be
written down."""

from __future__ import annotations

import errno
import os

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
BLOCK = 4096


def is_full(error: OSError) -> bool:
    """Returns whether it failed for want of room."""
    return error.errno in FULL


class Reserve:
    """The content of an open file that is there for another reason, such as a lock; what it says means nothing."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fill(self, nbytes: int) -> None:
        """Keeps room for a file of `nbytes` that grows a little; as much of it as there is."""
        missing = (nbytes // BLOCK + 2) * BLOCK - os.fstat(self._descriptor).st_size
        try:
            while missing > 0:
                # Zeros would take no room on a file system that compresses.
                missing -= os.write(self._descriptor, os.urandom(missing))
        except OSError as error:
            if not is_full(error):
                raise

    def give(self) -> bool:
        """Returns whether there was any, which is free now."""
        if os.fstat(self._descriptor).st_size == 0:
            return False
        os.ftruncate(self._descriptor, 0)
        return True
