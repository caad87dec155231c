"""What a connection has received and not yet read: h11's buffer, through which a long body passes without copies."""

from __future__ import annotations

from h11._receivebuffer import ReceiveBuffer

WHOLE = 16_384
"""A piece of this many bytes is kept as it came, as long as nothing else is there."""


class WholePieces(ReceiveBuffer):
    """h11 copies what it is given four times before it gives it away, with Python's lock held: for a push of many
    megabytes that is time that the engine's thread waits. Here a piece that lies within a body is given away as it
    came. Whatever else is read, lines and the ends of bodies, is read by h11 from its own memory."""

    def __init__(self) -> None:
        super().__init__()
        self._piece = b""
        """Never beside bytes in h11's own memory."""

    def __iadd__(self, received: bytes | bytearray) -> WholePieces:
        if isinstance(received, bytes) and len(received) >= WHOLE and not self:
            self._piece = received
        else:
            self._keep()
            super().__iadd__(received)
        return self

    def _keep(self) -> None:
        """Puts the piece where h11 reads."""
        if self._piece:
            piece, self._piece = self._piece, b""
            super().__iadd__(piece)

    def __len__(self) -> int:
        return len(self._piece) + super().__len__()

    def __bytes__(self) -> bytes:
        return self._piece + super().__bytes__()

    def maybe_extract_at_most(self, count: int) -> bytes | bytearray | None:  # type: ignore[override]
        if not self._piece or len(self._piece) > count:
            self._keep()
            return super().maybe_extract_at_most(count)
        piece, self._piece = self._piece, b""
        return piece

    def maybe_extract_next_line(self) -> bytearray | None:
        self._keep()
        return super().maybe_extract_next_line()

    def maybe_extract_lines(self) -> list[bytearray] | None:
        self._keep()
        return super().maybe_extract_lines()

    def is_next_line_obviously_invalid_request_line(self) -> bool:
        self._keep()
        return super().is_next_line_obviously_invalid_request_line()
