"""The queue alone: how many samples start at once, and which requests are overdue."""

from __future__ import annotations

import random

import pytest

from rollout_server.engine.batch.joining import BatchKey, age_of
from rollout_server.engine.batch.row import Group
from rollout_server.engine.messages.rollouts import Submit
from rollout_server.engine.requests.queue import RequestQueue
from rollout_server.rollout import PolicyAddress, RolloutRequest, SamplingParams


def submitted(id: str, n: int = 1, deadline: float | None = None) -> Submit:
    sampling = SamplingParams(max_tokens=4)
    request = RolloutRequest(
        id=id, prompt_ids=(1, 2), sampling=sampling, policy=PolicyAddress("base"), n=n, seeds=tuple(range(n))
    )
    return Submit(id, (request,), deadline)


@pytest.mark.parametrize("room", [0, 1, 2, 63, 64, 65, 255, 256])
def test_as_many_samples_start_as_there_is_room_for(room: int) -> None:
    asked: list[int] = []

    def fit(group: Group, count: int) -> tuple[int, int] | None:
        asked.append(count)
        return (0, 0) if count <= room else None

    queue = RequestQueue(256)
    queue.submit(submitted("a", n=256))
    admission = queue.next_admission(0, fit)
    assert (admission.count if admission else 0) == room
    assert queue.crowded == (room == 0)
    assert len(asked) <= 10, "not every count is tried"


def test_requests_are_overdue_until_they_are_closed() -> None:
    queue = RequestQueue(4)
    for id, deadline in (("late", 9.0), ("soon", 2.0), ("never", None), ("over", 1.0)):
        queue.submit(submitted(id, deadline=deadline))
    queue.close("over")
    assert [open_request.id for open_request in queue.overdue(1.5)] == []
    assert [open_request.id for open_request in queue.overdue(3.0)] == ["soon"]
    assert [open_request.id for open_request in queue.overdue(9.0)] == ["soon", "late"], "nobody has ended it"
    queue.close("soon")
    assert [open_request.id for open_request in queue.overdue(10.0)] == ["late"]


def test_an_id_that_was_taken_again_has_the_time_of_its_new_request() -> None:
    queue = RequestQueue(4)
    queue.submit(submitted("a", deadline=2.0))
    queue.close("a")
    queue.submit(submitted("a", deadline=9.0))
    assert queue.overdue(3.0) == []
    assert [open_request.id for open_request in queue.overdue(9.0)] == ["a"]
    queue.close("a")
    queue.submit(submitted("a"))
    assert queue.overdue(10.0) == []


def test_groups_begin_in_the_order_in_which_they_came_whatever_clocks_say() -> None:
    """Ranks of one engine have clocks of their own, and have to begin with the same group."""
    queue = RequestQueue(8)
    groups = [group for id in "abc" for group in queue.submit(submitted(id)).groups]
    for group in groups:
        group.arrived = 5.0
    queue.hold_for_version(groups[0], 1.0)
    queue.bring_back(lambda group: True)
    begun = []
    while admission := queue.next_admission(0, lambda group, count: BatchKey(0)):
        queue.admitted(admission)
        begun.append(admission.group)
    assert begun == groups
    assert sorted(groups, key=lambda group: age_of(group, 0)) == groups


def test_samples_that_wait_are_counted_through_all_that_becomes_of_them() -> None:
    chance, queue = random.Random(5), RequestQueue(64)
    groups: list[Group] = []
    for number in range(600):
        if chance.random() < 0.3:
            groups += queue.submit(submitted(str(number), n=chance.randrange(1, 9))).groups
        elif groups and chance.random() < 0.2:
            queue.drop(chance.choice(groups))
        elif groups and chance.random() < 0.2:
            head = next(filter(queue.heads, groups), None)
            queue.hold_for_version(head, 1.0) if head and chance.random() < 0.5 else queue.bring_back(lambda _: True)
        elif admission := queue.next_admission(0, lambda group, count: BatchKey(0)):
            queue.admitted(admission)
            if chance.random() < 0.3:
                queue.put_back(admission.group, admission.count)
        assert queue.waiting_rows == sum(group.waiting for group in groups)
    assert len(groups) > 100 and queue.waiting_rows
