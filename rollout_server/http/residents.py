"""Models that one process serves, each with an engine of its own, and which of them an address is of."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

from litestar.connection import ASGIConnection

from rollout_server.engine.handle import EngineHandle
from rollout_server.engine.messages.options import Task
from rollout_server.errors import EngineUnavailable, InvalidField, UnknownPolicy
from rollout_server.http.service import Service, resident_in, some_of
from rollout_server.quoting import counted, quoted
from rollout_server.rollout import BASE, PolicyAddress

T = TypeVar("T")
Asked = tuple[Service, PolicyAddress]
"""A model, and the policy of it that is asked."""

RESIDENTS_KEY = "residents"
_WHAT: Mapping[Task, str] = MappingProxyType(
    {
        "generate": "generates",
        "classify": "gives a label score to a sequence",
        "token_classify": "gives label scores to tokens",
        "embed": "gives vectors",
    }
)
"""What a model of a task does, as a sentence says it."""


@dataclass(frozen=True)
class Residents:
    """One per application: the model of `--model`, and those of `--also` by their names."""

    base: Service
    also: Mapping[str, Service] = field(default_factory=dict)

    @property
    def every(self) -> tuple[Service, ...]:
        return (self.base, *self.also.values())

    def of(self, address: str | None) -> Service:
        """The model that an address is of; that of `--model` for an address that is none. A name that nobody has is
        refused where it is parsed."""
        if not self.also or address is None:
            return self.base
        name = resident_in(address, self.base.info.id, self.base.residents)
        return self.also[name] if name else self.base

    def named(self, model: str | None) -> Service:
        """The model of a field that names nothing but a model. Raises `UnknownPolicy` for one that is not here."""
        if model in (None, BASE):
            return self.base
        if model in self.also:
            return self.also[str(model)]
        if model == self.base.info.id:
            return self.base
        there = some_of([BASE, *self.also])
        raise UnknownPolicy(f"There is no model {quoted(model)} here; there are {there}.", param="model")

    def scorer(self, *tasks: Task, labels: int | None = None) -> Asked:
        """The one model of these tasks, with so many labels if that matters, for a request that names none. Raises
        `InvalidField` unless there is just one."""
        found = self._scorers(tasks, labels)
        if len(found) == 1:
            return found[0]
        if not found and (others := self._scorers(tasks, None)):
            raise InvalidField(
                f"No model that is served here gives a sequence {counted(labels or 0, 'label score')}; others give "
                f"more ({_names(others)}): ask /classify for those.",
                param="model",
            )
        if not found:
            raise InvalidField(
                f"No model that is served here {_WHAT[tasks[0]]}: push an adapter with such a head (PEFT's SEQ_CLS or "
                "TOKEN_CLS), or start a server on such a model.",
                param="model",
            )
        raise InvalidField(f"Several models can answer this here ({_names(found)}): say which by model.", param="model")

    def _scorers(self, tasks: Sequence[Task], labels: int | None) -> list[Asked]:
        return [(service, address) for service in self.every for address in service.scorers(tasks, labels)]

    @property
    def living(self) -> tuple[EngineHandle, ...]:
        """The engines that have not died; that of the base where all have, to say why."""
        found = tuple(service.engine for service in self.every if service.engine.status.state != "dead")
        return found or (self.base.engine,)

    async def each(self, ask: Callable[[EngineHandle], Coroutine[Any, Any, T]]) -> list[T]:
        """Asks every engine that lives, all at once; what one of them fails with is raised when all have answered."""
        found = await asyncio.gather(*map(ask, self.living), return_exceptions=True)
        done = []
        for result in found:
            if isinstance(result, BaseException):
                raise result
            done.append(result)
        return done

    async def started(self) -> None:
        """Waits until every model can be asked; raises what stood in the way."""
        await asyncio.gather(*(service.startup.finished() for service in self.every))

    async def close(self) -> None:
        """Ends every engine's thread; open requests get `EngineUnavailable`, and starts are given up."""
        for service in self.every:
            service.startup.give_up()
        await asyncio.gather(*(service.engine.close() for service in self.every))

    def check(self, service: Service) -> None:
        """Raises `EngineUnavailable`, which names the model where there are several, unless its engine is ready."""
        status = service.engine.status
        if status.state != "ready":
            raise EngineUnavailable(self._about(service, status.fault or f"The engine is {status.state}."))

    async def answers(self, service: Service, within_s: float) -> None:
        """Raises `EngineUnavailable` unless the engine's thread answers within so many seconds."""
        self.check(service)
        if not await service.engine.ping(within_s):
            self.check(service)  # It may have died since, and says why.
            raise EngineUnavailable(self._about(service, f"The engine thread did not answer within {within_s:g} s."))

    def _about(self, service: Service, fault: str) -> str:
        return f"The model {service.name}: {fault}" if self.also else fault


def _names(found: Sequence[Asked]) -> str:
    return some_of([service.called(address.name) for service, address in found])


def residents_of(connection: ASGIConnection[Any, Any, Any, Any]) -> Residents:
    """The models of the application that this connection belongs to."""
    residents = connection.app.state[RESIDENTS_KEY]
    if not isinstance(residents, Residents):
        raise TypeError("The application was not made by create_app.")
    return residents
