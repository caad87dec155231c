"""What a request has of the engine, on the event loop's side: events of its rows, and a version that scores them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import numpy as np

from rollout_server.engine.messages.rollouts import Event, RequestFailed, RowFinished, TokensSampled
from rollout_server.engine.messages.scoring import Classified, Classify, ScorerHeld
from rollout_server.rollout import PolicyAddress, PolicyVersion
from rollout_server.text.pictures.picture import Picture


class Subscription:
    """The events of one request: an async iterator of `TokensSampled` and `RowFinished` that ends when every row was
    reported, or raises the request's error. Leaving early should `abort`."""

    def __init__(self, id: str, end: Callable[[Subscription, str], None]) -> None:
        self.id = id
        self._end = end
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._ended = False

    def __aiter__(self) -> AsyncIterator[TokensSampled | RowFinished]:
        return self

    async def __anext__(self) -> TokensSampled | RowFinished:
        if self._ended:
            raise StopAsyncIteration
        event = await self._events.get()
        match event:
            case TokensSampled() | RowFinished():
                return event
            case RequestFailed(error=error):
                self._ended = True
                raise error
            case _:
                self._ended = True
                raise StopAsyncIteration

    def abort(self, reason: str = "disconnect") -> None:
        """Ends what is left of the request; its rows are still reported. Does nothing once the request is over."""
        if not self._ended:
            self._end(self, reason)

    def deliver(self, event: Event) -> None:
        self._events.put_nowait(event)


class HeldScorer:
    """One version for all rows of a call, whatever its name means later. It has to be let go."""

    def __init__(
        self,
        held: ScorerHeld,
        owner: str,
        new_id: Callable[[str], str],
        ask: Callable[[Classify], Awaitable[Classified]],
        let_go: Callable[[HeldScorer], None],
    ) -> None:
        self.id = held.id
        self.owner = owner
        """The request whose rows it scores."""
        self.version: PolicyVersion = held.version
        self.labels = held.labels
        self._new_id = new_id
        self._ask = ask
        self._let_go = let_go
        self._gone = False

    async def scores(
        self, tokens: Sequence[int], position: int, shared: int = 0, pictures: tuple[Picture, ...] = ()
    ) -> tuple[float, ...]:
        """The head's scores of its labels at a position of a sequence, raw float32. Its `shared` first tokens, which
        other rows begin with as well, are read once for all of them. Raises what a sequence can be refused with, and
        `EngineUnavailable` where the call was ended. Cancelling it ends the reading."""
        address = PolicyAddress(self.version.name, number=self.version.number)
        id, sequences, shown = self._new_id("reward"), (tuple(tokens),), (pictures,) if pictures else ()
        classify = Classify(id, address, sequences, ((position,),), held=self.id, shared=shared, pictures=shown)
        classified = await self._ask(classify)
        return tuple(np.frombuffer(classified.scores[0], "<f4").tolist())

    def let_go(self) -> None:
        """Once is enough; more do nothing."""
        if not self._gone:
            self._gone = True
            self._let_go(self)
