"""The text of a row while it is being sampled: nothing leaves that a stop string may still take back."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rollout_server.text.detokenize import IncrementalText


class RowText:
    """Decoded text of one streamed row. `push` tokens, send what `ready` gives, end with `finish`."""

    __slots__ = ("_decoder", "_ends", "_held", "_judged", "_sent", "_stops")

    def __init__(self, decoder: IncrementalText, *, stops: Sequence[str], ends: Collection[int]) -> None:
        self._decoder = decoder
        self._stops = stops
        # A token that may be the end has no text until another one shows that it was not.
        self._ends = ends
        self._held: list[int] = []
        # Characters in which no stop string ended the row: another token came after them.
        self._judged = 0
        self._sent = 0

    @property
    def sent(self) -> int:
        """How many characters `ready` gave."""
        return self._sent

    @property
    def length(self) -> int:
        """How many characters are decided. A token that may be the end, or that nothing followed, begins behind
        them."""
        return self._decoder.length

    @property
    def begins(self) -> Sequence[int]:
        """Where in the row's text its tokens begin, those first that the prompt left open, as far as that is known."""
        return self._decoder.starts

    @property
    def opened(self) -> int:
        """How many tokens of the prompt begin within the text, in a character that the prompt left open."""
        return self._decoder.opened

    def push(self, id: int) -> None:
        """Adds a token."""
        if self._held:
            self._decoder.push(self._held)
            self._held.clear()
        self._judged = self._decoder.length
        if id in self._ends:
            self._held.append(id)
        else:
            self._decoder.push([id])

    def ready(self) -> str:
        """The text that no stop string can take back any more, once."""
        unsent = self._decoder.tail(self._decoder.length - self._sent)
        return self._send(unsent[: self._first_doubt(unsent)])

    def finish(self) -> str:
        """All its text, where no stop string and no end token cuts it; nothing follows."""
        self._decoder.finish()
        return self._decoder.text

    def rest(self, text: str) -> str:
        """What is left to send of the row's whole `text`; nothing follows."""
        self._decoder.finish()
        return text[self._sent :]

    def _first_doubt(self, unsent: str) -> int:
        """The first place in `unsent` where a stop string stands or may begin."""
        if not self._stops:
            return len(unsent)
        fresh = self._judged - self._sent
        for at in range(len(unsent)):
            rest = len(unsent) - at
            for stop in self._stops:
                if rest < len(stop):
                    if stop.startswith(unsent[at:]):
                        return at
                elif at + len(stop) > fresh and unsent.startswith(stop, at):
                    return at
        return len(unsent)

    def _send(self, text: str) -> str:
        self._sent += len(text)
        return text
