"""What the owner of a name must believe of it: the account that tests keep beside the registry's, change by change."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from adapters.spec import Mode
from rollout_server.engine.messages.versions import (
    Activate,
    Delete,
    Deleted,
    Exported,
    Pin,
    Pinned,
    Publish,
    Published,
    Restore,
)
from rollout_server.errors import (
    Conflict,
    PreconditionFailed,
    StalePolicy,
    UnknownPolicy,
    VersionGone,
)

REFUSALS = (UnknownPolicy, VersionGone, StalePolicy, Conflict, PreconditionFailed)


@dataclass(frozen=True)
class Kept:
    digest: str
    mode: Mode
    label: str | None


@dataclass
class Line:
    """One name as its owner must know it."""

    last: int = 0
    live: int | None = None
    kept: dict[int, Kept] = field(default_factory=dict)
    pinned: set[int] = field(default_factory=set)
    this_turn: set[int] = field(default_factory=set)
    """Every version that was kept at some moment of the turn."""
    provisional: int | None = None
    """A version that was made and not yet published for good: retention must not count it."""

    def met(self, if_match: str | None) -> bool:
        if if_match is None:
            return True
        if self.live is None:
            return False
        return self.kept[self.live].digest.startswith(if_match) if ":" in if_match else int(if_match) == self.live

    def changed(self, command: Any, event: Any) -> None:
        """The answer to a change. Raises `AssertionError` where it is not what the change must bring about."""
        match command:
            case Publish():
                self._published(command, event)
            case Activate():
                assert isinstance(event, Published) and event.version.number == command.number in self.this_turn
                assert self.met(command.if_match), "the alias was elsewhere"
                assert event.version.label == self.kept[command.number].label
                if not command.check_only:
                    assert event.live
                    self.live = command.number
            case Pin():
                assert isinstance(event, Pinned) and event.status.version.number == command.number in self.this_turn
                (self.pinned.add if command.pinned else self.pinned.discard)(command.number)
            case Delete():
                self._deleted(command, event)
            case Restore():
                self.restored(command)
            case _:
                assert isinstance(event, Exported)
                assert event.bundle.digest == event.version.digest == self.kept[command.number].digest

    def _published(self, command: Publish, event: Any) -> None:
        assert isinstance(event, Published)
        number, mode = event.version.number, command.mode or command.bundle.spec.modes[0]
        content = (command.bundle.digest, mode)
        same = [n for n in (self.live, self.last) if n in self.kept and self.holds(n) == content]
        assert (event.version.digest, event.mode) == content
        assert (event.unchanged, number) == ((True, same[0]) if same else (False, self.last + 1))
        assert same or self.met(command.if_match), "the alias was elsewhere"
        label = self.kept[number].label if same else command.label
        if command.label is not None and not command.provisional:
            label = command.label
        assert event.version.label == label
        self.last = max(self.last, number)
        self.kept[number] = Kept(*content, label)
        self.this_turn.add(number)
        if command.provisional:
            self.provisional = self.provisional if same else number
            return
        self.provisional = None
        self.live = number if command.activate else self.live

    def _deleted(self, command: Delete, event: Any) -> None:
        assert isinstance(event, Deleted) and set(event.numbers) <= self.this_turn and event.last == self.last
        assert command.number is None or (event.numbers == (command.number,) and command.number != self.live)
        self.live = None if command.number is None else self.live
        for number in event.numbers:
            self.kept.pop(number, None)
            self.pinned.discard(number)
            self.provisional = None if number == self.provisional else self.provisional

    def restored(self, command: Restore) -> None:
        self.last = command.last
        self.kept = {v.number: Kept(v.bundle.digest, v.mode, v.label) for v in command.versions}
        self.pinned = {version.number for version in command.versions if version.pinned}
        self.live = next((version.number for version in command.versions if version.live), None)
        self.this_turn |= self.kept.keys()

    def refused(self, command: Any, error: Exception, failing: tuple[type[Exception], ...] = ()) -> None:
        """Only what is not there is refused, a condition that does not hold, or the deletion of what is live; `failing`
        are errors that the test itself brought about."""
        if isinstance(error, failing):
            return
        assert isinstance(error, REFUSALS), repr(error)
        number = getattr(command, "number", None) or (command.policy.number if hasattr(command, "policy") else None)
        if isinstance(error, PreconditionFailed):
            assert not self.met(command.if_match)
            assert error.at == (None if self.live is None else (command.name, self.live, self.kept[self.live].digest))
        elif isinstance(error, Conflict):
            assert isinstance(command, Delete) and number == self.live
        else:
            assert not isinstance(command, Publish), repr(error)
            if number is not None:
                assert number not in self.pinned and number != self.live, f"{number}: {error}"
                assert isinstance(error, VersionGone) == (1 <= number <= self.last)

    def holds(self, number: int) -> tuple[str, Mode]:
        return self.kept[number].digest, self.kept[number].mode
