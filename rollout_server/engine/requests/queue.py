"""Who waits, who may start, and when a request is over. Plain Python; knows neither arrays nor threads."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rollout_server.engine.batch.joining import Admission, BatchKey
from rollout_server.engine.batch.row import Group
from rollout_server.engine.messages.rollouts import Submit
from rollout_server.errors import RolloutError
from rollout_server.text.pictures.picture import Picture

if TYPE_CHECKING:
    from rollout_server.engine.sight.sight import Sight


@dataclass(slots=True, eq=False)
class OpenRequest:
    """An open request: it ends when its last row was reported."""

    id: str
    groups: tuple[Group, ...]
    members: frozenset[Group]
    """The same groups, for looking one up: a request may have 65,536."""
    open_rows: int
    deadline: float | None
    waiting_groups: int
    streams: bool = False
    """Somebody reads its tokens as they come."""
    produced: bool = False
    """Some row has at least one token, so the reply is a list of rows and not an error."""
    error: RolloutError | None = None

    def timed_out(self, now: float) -> bool:
        return self.deadline is not None and self.deadline <= now


class RequestQueue:
    """First come, first served: a group that does not fit yet lets no later one pass, so nothing starves. A group that
    waits for a version to be pushed is held apart, and comes back to the place its arrival gives it.

    `prompt_cells(tokens)` are the columns that a prompt takes which is kept for samples that wait; `see` says where the
    pictures of a prompt stand."""

    def __init__(
        self,
        max_rows: int,
        prompt_cells: Callable[[int], int] = lambda tokens: tokens,
        see: Callable[[Sequence[int], Sequence[Picture]], Sight | None] = lambda tokens, pictures: None,
    ) -> None:
        self._see = see
        self.open_requests: dict[str, OpenRequest] = {}
        self.waiting_requests = 0
        self.waiting_rows = 0
        """Samples that were not admitted yet; those that wait for a version count."""
        self.streams = 0
        """Open requests of which somebody reads the tokens as they come."""
        self.crowded = False
        """The group at the head of the queue waits for KV memory."""
        self._numbers = itertools.count()
        self._waiting: deque[Group] = deque()
        self._deadlines: list[tuple[float, str]] = []
        """(Deadline, id) of requests that have one, the soonest first."""
        self._held_for_version: dict[Group, float] = {}
        """Groups that wait for a version, and until when (time.monotonic())."""
        self._max_rows = max_rows
        self._prompt_cells = prompt_cells

    def submit(self, submit: Submit) -> OpenRequest:
        groups = tuple(
            Group(each, self._see(each.given_ids, each.pictures), next(self._numbers), submit.begins_on)
            for each in submit.groups
        )
        rows = sum(group.request.n for group in groups)
        streams = any(group.request.wants.tokens_as_they_come for group in groups)
        open_request = OpenRequest(submit.id, groups, frozenset(groups), rows, submit.deadline, len(groups), streams)
        self.open_requests[submit.id] = open_request
        self.streams += streams
        if submit.deadline is not None:
            heapq.heappush(self._deadlines, (submit.deadline, submit.id))
        self._waiting.extend(groups)
        self.waiting_requests += 1
        self.waiting_rows += rows
        return open_request

    def startable(self, running: int) -> int:
        """Samples that wait and that places are free for, given `running` rows, whatever memory says."""
        free, found = self._max_rows - running, 0
        for group in self._waiting:
            if found >= free:
                break
            found += group.waiting
        return max(0, min(found, free))

    def next_admission(self, running: int, fit: Callable[[Group, int], BatchKey | None]) -> Admission | None:
        """What may start now, given `running` rows. `fit(group, count)` says in which batch `count` samples of a group
        could start, or None where KV memory has no room."""
        self.crowded = False
        while self._waiting and not self._waiting[0].waiting:
            self._waiting.popleft()
        if not self._waiting:
            return None
        group = self._waiting[0]
        if group.joining:
            return None
        most = min(group.waiting, self._max_rows - running)
        if most < 1:
            return None
        if batch_key := fit(group, most):
            return Admission(group, most, batch_key)
        found = fit(group, 1) if most > 1 else None
        if found is None:
            self.crowded = True
            return None
        # As many as fit, by halving: asking for every count each turn costs more than the step where n is large.
        fits, fails = 1, most
        while fails - fits > 1:
            count = (fits + fails) // 2
            if batch_key := fit(group, count):
                fits, found = count, batch_key
            else:
                fails = count
        return Admission(group, fits, found)

    @property
    def _keeping(self) -> Iterator[tuple[Group, int]]:
        """Groups whose prompts are kept for samples that wait, and the prompts' tokens: only the first in the queue
        have begun. Where samples are joining, the prompt counts as theirs."""
        for group in self._waiting:
            if group.version is None:
                return
            if group.prompt is not None and group.prompt.kept is not None and not group.joining:
                yield group, len(group.prompt.tokens)

    def kept_cells(self) -> int:
        """KV columns of prompts that are kept for samples that wait."""
        return sum(self._prompt_cells(tokens) for _, tokens in self._keeping)

    def drop_kept(self) -> None:
        """Gives up the prompts that are kept: they will be read again."""
        for group, _ in self._keeping:
            group.prompt = None

    def heads(self, group: Group) -> bool:
        """Returns whether a group still waits at the head of the queue."""
        return bool(group.waiting and self._waiting and self._waiting[0] is group)

    # ---- waiting for a version --------------------------------------------------------------------------------------

    def hold_for_version(self, group: Group, until: float) -> None:
        """Takes the group at the head of the queue out of it, to wait for a version without holding up others."""
        self._waiting.remove(group)
        self._held_for_version[group] = until

    def bring_back(self, ready: Callable[[Group], bool]) -> None:
        """Puts the groups that are ready back into the queue, in the order in which all arrived."""
        back = [group for group in self._held_for_version if ready(group)]
        for group in back:
            del self._held_for_version[group]
        if back:
            self._waiting = deque(sorted([*self._waiting, *back], key=lambda group: group.number))

    def impatient(self, now: float) -> list[Group]:
        """Groups that have waited long enough for their version."""
        return [group for group, until in self._held_for_version.items() if until <= now]

    @property
    def pressing(self) -> bool:
        """True if something waits that a step could let start."""
        return bool(self._waiting)

    def rest(self, now: float, most: float) -> float:
        """Seconds, at most `most`, until something must be ended although nothing runs."""
        ends = [t.deadline for t in self.open_requests.values() if t.deadline is not None] + list(
            self._held_for_version.values()
        )
        return min([most, *(max(0.0, end - now) for end in ends)])

    # ---- leaving the queue ------------------------------------------------------------------------------------------

    def admitted(self, admission: Admission) -> None:
        admission.group.admitted += admission.count
        self.waiting_rows -= admission.count
        if not admission.group.waiting:
            self._left_queue(admission.group)

    def put_back(self, group: Group, count: int) -> None:
        """The last `count` samples that were admitted have not started after all: they are first in the queue."""
        if not group.waiting:
            open_request = self.open_requests.get(group.request.id)
            if open_request is not None:
                self.waiting_requests += open_request.waiting_groups == 0
                open_request.waiting_groups += 1
        group.admitted -= count
        self.waiting_rows += count
        if group in self._waiting:
            self._waiting.remove(group)
        self._waiting.appendleft(group)

    def drop(self, group: Group) -> int:
        """Takes what still waits of a group out of the queue; returns how many samples that were."""
        left = group.waiting
        if left:
            self._held_for_version.pop(group, None)
            # Taken out of the queue when it comes to its head: removing it now would search the queue.
            group.admitted = group.request.n
            self.waiting_rows -= left
            self._left_queue(group)
        return left

    def _left_queue(self, group: Group) -> None:
        open_request = self.open_requests.get(group.request.id)
        if open_request is not None:
            open_request.waiting_groups -= 1
            self.waiting_requests -= open_request.waiting_groups == 0

    def row_reported(self, id: str) -> OpenRequest | None:
        """Counts a reported row; returns the request, closed, if that was its last."""
        open_request = self.open_requests[id]
        open_request.open_rows -= 1
        return self.close(id) if open_request.open_rows == 0 else None

    def close(self, id: str) -> OpenRequest:
        closed = self.open_requests.pop(id)
        self.streams -= closed.streams
        return closed

    def overdue(self, now: float) -> list[OpenRequest]:
        """Requests whose time is over, the first of them first; told again until they are closed."""
        due = []
        while self._deadlines and self._deadlines[0][0] <= now:
            due.append(heapq.heappop(self._deadlines))
        # One that is over keeps its place here until its time, and its id may have been taken again.
        still = [(at, id) for at, id in due if id in self.open_requests and self.open_requests[id].timed_out(now)]
        for entry in still:
            heapq.heappush(self._deadlines, entry)
        return [self.open_requests[id] for id in dict.fromkeys(id for _, id in still)]
