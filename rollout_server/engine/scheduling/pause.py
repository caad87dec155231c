"""Decides whether new work waits and running rows stand still. Plain Python; knows neither arrays nor threads."""

from __future__ import annotations

from typing import Protocol

from rollout_server.engine.messages.control import Pause, Paused, PauseMode, Resume
from rollout_server.engine.messages.rollouts import Event
from rollout_server.engine.messages.scoring import Classify, ScoringCommand
from rollout_server.errors import EngineUnavailable, RolloutError


class Answers(Protocol):
    """Where answers go; the engine's reports."""

    def add(self, event: Event) -> None: ...

    def fail(self, id: str, error: RolloutError) -> None: ...


class PauseState:
    """`mode` None: everything goes on. A pause replaces the one before. What every turn asks is counted when it
    changes."""

    def __init__(self, reports: Answers) -> None:
        self.mode: PauseMode | None = None
        self.paused = False
        """New work waits."""
        self.frozen = False
        """Nothing is computed at all."""
        self._reports = reports
        self._held: list[ScoringCommand] = []
        self.unanswered: list[Pause | Resume] = []
        """Commands whose senders are still to be told that it is so."""

    def _change(self, mode: PauseMode | None) -> None:
        self.mode, self.paused, self.frozen = mode, mode is not None, mode == "keep"

    def pause(self, command: Pause) -> None:
        self._change(command.mode)
        self.unanswered.append(command)

    def resume(self, command: Resume) -> list[ScoringCommand]:
        """Returns the requests that were held, in the order they came."""
        self._change(None)
        self.unanswered.append(command)
        held, self._held = self._held, []
        return held

    def holds(self, score: ScoringCommand) -> bool:
        """Takes a request that is nothing but reading if it has to wait; rows wait in the scheduler. What scores a row
        that has run is no new work."""
        waits = self.paused and not (isinstance(score, Classify) and score.held)
        if waits:
            self._held.append(score)
        return waits

    def end(self, id: str, reason: str) -> None:
        """Ends a request that is held here, if it is."""
        if any(score.id == id for score in self._held):
            self._held = [score for score in self._held if score.id != id]
            self._reports.fail(id, EngineUnavailable(f"The request was ended ({reason}) before it was scored."))

    def answer(self, computing: bool) -> None:
        """Tells those who paused or resumed that it is so. Who asked for a drained engine waits until nothing runs,
        or is frozen, or until it is resumed."""
        waiting: list[Pause | Resume] = []
        for command in self.unanswered:
            if isinstance(command, Pause) and command.drain and computing and self.paused and not self.frozen:
                waiting.append(command)
            else:
                self._reports.add(Paused(command.id, self.mode))
        self.unanswered = waiting

    @property
    def open_requests(self) -> list[str]:
        """Ids of whatever still waits for an answer from here."""
        return [command.id for command in (*self._held, *self.unanswered)]
