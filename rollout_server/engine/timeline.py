"""A timeline of turns, in Chrome's trace format: where a turn's time went, to be looked at in Perfetto or
chrome://tracing.

Format: "Trace Event Format", JSON array of complete events (`ph` X, `ts` and `dur` in microseconds). The array may lack
its end, so that a process that is killed leaves a file that opens. Plain Python; belongs to the engine's thread.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import IO, Any, Self

from rollout_server.errors import InvalidField

log = logging.getLogger(__name__)

Stage = tuple[str, float, float]
"""What was done, from when to when, in seconds of `time.perf_counter`."""

MOST_BYTES = 256 * 2**20
"""Size of one file: viewers open hardly more."""
LEAST_S = 1e-5
"""A shorter part of which nothing is noted is left out: most turns have nothing to do in most parts."""
TURNS, PUSHES = 1, 2
"""Numbers of tracks. Pushes that overlap take further ones, from `PUSHES` on."""


class Unseen:
    """A part of a turn while nothing is recorded."""

    began = 0.0

    def note(self, **values: object) -> None:
        """Says what was done in this part."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing was opened."""


class Part(Unseen):
    """A part that is recorded: `ended` gets it when it is left, with what raised in it noted as `error`."""

    def __init__(self, name: str, clock: Callable[[], float], ended: Callable[[Part], None]) -> None:
        self.name = name
        self.values: dict[str, object] = {}
        self.noted = False
        self._clock = clock
        self._ended = ended

    def note(self, **values: object) -> None:
        self.values |= values
        self.noted = True

    def __enter__(self) -> Self:
        self.began = self._clock()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.values["error"] = kind.__name__
        self._ended(self)


class Timeline:
    """Records to the file at `path`, or with None nothing: then `part` costs one test. `clock` is in seconds, and that
    of the stages that `push` is told. Raises `InvalidField` where the file cannot be made. Recording ends with a line
    in the log where the file holds `most_bytes` or cannot be written any more; the engine goes on."""

    def __init__(
        self,
        path: str | None = None,
        clock: Callable[[], float] = time.perf_counter,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self._file = None if path is None else _created(path)
        self._clock = clock
        self._start = clock()
        self._left = most_bytes
        self._begun = False
        self._unseen = Unseen()
        self._events: list[dict[str, Any]] = []
        """Not written yet, each behind what lies inside it."""
        self._turns = 0
        self._first = 0
        """Where the events begin that belong to the turn under way."""
        self._busy = False
        """True if that turn did anything."""
        self._pushes: dict[str, float] = {}
        """When staging began, of pushes under way, by the command's id."""
        self._tracks: list[float] = []
        """When the last push of each track ended."""
        if self._file is not None:
            self._events.append({"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "rollout-server"}})
            self._name_track(TURNS, "turns")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write()
        self._close()

    def part(self, name: str) -> Unseen:
        """`with timeline.part("prefill") as part:` around what is done, `part.note(tokens=512)` inside. Parts lie
        inside each other."""
        if self._file is None:
            return self._unseen
        return Part(name, self._clock, self._part_ended)

    def turn(self) -> Unseen:
        """Encloses the parts of one turn. A turn in none of whose parts anything is noted is left out, so that an
        engine at rest writes nothing."""
        if self._file is None:
            return self._unseen
        self._first, self._busy = len(self._events), False
        return Part("turn", self._clock, self._turn_ended)

    def push(self, id: str, name: str, before: Sequence[Stage], part: Unseen, *, done: bool) -> None:
        """A push was taken further in `part`. Once it is done, its stages stand on a track of pushes: those `before`
        the engine had it, and how long it was staged beside the rows that ran."""
        if self._file is None:
            return
        began = self._pushes.setdefault(id, part.began)
        if not done:
            return
        del self._pushes[id]
        stages = [*before, ("stage and publish", began, self._clock())]
        first, last = min(begin for _, begin, _ in stages), stages[-1][2]
        track = self._free_track(first, last)
        self._events += [self._event(stage, begin, end, track, {"policy": name}) for stage, begin, end in stages]
        self._events.append(self._event("push", first, last, track, {"policy": name}))

    # ---- events ---------------------------------------------------------------------------------------------------

    def _part_ended(self, part: Part) -> None:
        end = self._clock()
        self._busy |= part.noted
        if part.values or end - part.began >= LEAST_S:
            self._events.append(self._event(part.name, part.began, end, TURNS, part.values))

    def _turn_ended(self, turn: Part) -> None:
        self._turns += 1
        if not (self._busy or turn.noted):
            del self._events[self._first :]
            return
        self._events.append(
            self._event(turn.name, turn.began, self._clock(), TURNS, {"turn": self._turns, **turn.values})
        )
        self._write()

    def _event(self, name: str, begin: float, end: float, track: int, values: dict[str, Any]) -> dict[str, Any]:
        # Rounded ends, not lengths: what lies inside another still does.
        start, stop = (round(1e6 * (moment - self._start), 1) for moment in (begin, end))
        event = {"name": name, "ph": "X", "pid": 1, "tid": track, "ts": start, "dur": round(stop - start, 1)}
        return {**event, "args": values} if values else event

    def _free_track(self, begin: float, end: float) -> int:
        """The first track of pushes on which nothing lies after `begin`; taken until `end`."""
        free = next((track for track, until in enumerate(self._tracks) if until <= begin), len(self._tracks))
        if free == len(self._tracks):
            self._tracks.append(end)
            self._name_track(PUSHES + free, f"pushes {free + 1}" if free else "pushes")
        self._tracks[free] = end
        return PUSHES + free

    def _name_track(self, track: int, name: str) -> None:
        self._events.append({"name": "thread_name", "ph": "M", "pid": 1, "tid": track, "args": {"name": name}})

    # ---- the file -------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        """Hands everything to the system, so that nothing is lost where the process is killed."""
        lines = "".join(f",\n{json.dumps(event, default=str)}" for event in self._events)
        self._events = []
        self._left -= len(lines)
        if self._file is None or not lines:
            return
        if self._left < 0:
            log.warning("The timeline %s is full: what comes from now on is not in it.", self._file.name)
            self._close()
            return
        try:
            self._file.write(lines if self._begun else "[" + lines.removeprefix(","))
            self._file.flush()
            self._begun = True
        except OSError as error:
            log.warning("The timeline %s could not be written and ends here: %s.", self._file.name, error)
            self._file = None

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is None:
            return
        try:
            file.write("\n]\n" if self._begun else "[]\n")
            file.close()
        except OSError as error:
            log.warning("The timeline %s lacks its end, which viewers do without: %s.", file.name, error)


def _created(path: str) -> IO[str]:
    try:
        return open(path, "w", encoding="utf-8")
    except OSError as error:
        raise InvalidField(
            f"The timeline cannot be written to {path}: {error.strerror}. Name a file that may be made, in a folder "
            "that is there.",
            param="trace",
        ) from error
