"""Drives the engine of an encoder one turn at a time on the test's own thread."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from adapters.bundle import AdapterBundle
from rollout_server.engine.encoding.loop import EncoderEngine
from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.messages.rollouts import Command, Event
from rollout_server.engine.messages.scoring import Classified, Classify, Embed
from rollout_server.engine.messages.status import EngineStatus
from rollout_server.engine.messages.versions import Publish, Published
from rollout_server.engine.model.encoders.resident import ResidentEncoder
from rollout_server.engine.policies.table import PolicyTable
from rollout_server.engine.timeline import Timeline
from rollout_server.rollout import BASE, PolicyAddress


class Mailbox(queue.SimpleQueue[Command]):
    """Waits for nobody: the test has put in what there is."""

    def get(self, block: bool = True, timeout: float | None = None) -> Command:
        return super().get(block=False)


class Driven:
    """An engine whose turns are those of the test."""

    def __init__(self, encoder: ResidentEncoder, device: str | None = None, module: Any = None, **options: Any) -> None:
        """`device` is what is wrong with the device; `module` reads in the place of the encoder's own."""
        self.encoder, self.mailbox, self.events = encoder, Mailbox(), list[Event]()
        self.shown = [EngineStatus("starting")]
        policies = PolicyTable(encoder, EngineOptions("", "tiny", **options))
        post, show = self.events.extend, self.shown.append
        timeline, fault = Timeline(), lambda: device
        self.now = 0.0
        reads = encoder if module is None else replace(encoder, model=replace(encoder.model, module=module))
        self.engine = EncoderEngine(
            reads,
            policies,
            self.mailbox,
            post,
            show,
            device_fault=fault,
            timeline=timeline,
            clock=lambda: self.now,
        )

    @property
    def status(self) -> EngineStatus:
        return self.shown[-1]

    def ask(self, *commands: Command) -> list[Event]:
        """What is told until nothing is left to do."""
        told = len(self.events)
        for command in commands:
            self.mailbox.put(command)
        self.engine.turn()
        while self.status.waiting and self.status.paused is None:
            self.engine.turn()
        return self.events[told:]

    def push(self, name: str, bundle: AdapterBundle) -> None:
        (event,) = self.ask(Publish(f"push {name}", name, bundle))
        assert isinstance(event, Published), event


def classify(id: str, sequences: Sequence[tuple[int, ...]], policy: str = BASE, **more: Any) -> Classify:
    places = more.pop("positions", tuple((len(tokens) - 1,) for tokens in sequences))
    return Classify(id, PolicyAddress(policy), tuple(sequences), places, **more)


def embed(id: str, *sequences: tuple[int, ...]) -> Embed:
    return Embed(id, PolicyAddress(BASE), sequences)


def numbers(event: Event, labels: int) -> list[np.ndarray]:
    assert isinstance(event, Classified), event
    return [np.frombuffer(scores, "<f4").reshape(-1, labels) for scores in event.scores]
