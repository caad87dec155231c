"""Which sequences share a forward of an encoder."""

from __future__ import annotations

from adapters.placement import BASE_PLACEMENT, Placement
from rollout_server.engine.encoding.queue import EncodingJob, EncodingQueue, ForwardGroup
from rollout_server.engine.messages.scoring import Embed
from rollout_server.rollout import BASE, PolicyAddress, PolicyVersion

VERSION = PolicyVersion(BASE, 0, "sha256:0")
LONGEST = 100


def job(id: str, *lengths: int, placement: Placement = BASE_PLACEMENT) -> EncodingJob:
    sequences = tuple(tuple(range(length)) for length in lengths)
    return EncodingJob(Embed(id, PolicyAddress(BASE), sequences), VERSION, placement)


def queued(budget: int, *jobs: EncodingJob) -> EncodingQueue:
    queue = EncodingQueue(budget, LONGEST)
    for each in jobs:
        queue.add(each)
    return queue


def lengths(group: ForwardGroup | None) -> list[tuple[str, int]]:
    return [] if group is None else [(job.id, len(job.passages[index].ids)) for job, index in group.entries]


def test_sequences_of_one_width_go_together_the_widest_first() -> None:
    queue = queued(512, job("a", 3, 40, 8, 39, 5))
    assert lengths(queue.take()) == [("a", 40), ("a", 39)]
    assert lengths(queue.take()) == [("a", 3), ("a", 8), ("a", 5)]
    assert queue.take() is None
    assert queue.busy, "it was not answered yet"


def test_no_forward_is_larger_than_the_budget_unless_one_sequence_is() -> None:
    queue = queued(32, job("a", 8, 8, 8, 8, 8, 90))
    assert lengths(queue.take()) == [("a", 90)]
    assert [len(lengths(queue.take())) for _ in range(2)] == [4, 1]


def test_who_came_first_is_read_first_and_others_fill_up_its_forwards() -> None:
    queue = queued(512, job("a", 8), job("b", 60, 7), job("c", 5))
    assert lengths(queue.take()) == [("a", 8), ("b", 7), ("c", 5)]
    assert lengths(queue.take()) == [("b", 60)]


def test_a_small_request_does_not_wait_for_a_large_one_to_end() -> None:
    queue = queued(32, job("large", *[8] * 100, *[60] * 100))
    assert {id for id, _ in lengths(queue.take())} == {"large"}
    queue.add(job("small", 30))
    queue.add(job("same", 60, 60))
    assert lengths(queue.take()) == [("large", 60)], "whose turn it was already"
    assert lengths(queue.take()) == [("small", 30)]
    assert lengths(queue.take()) == [("same", 60)]
    assert [lengths(queue.take())[0][0] for _ in range(3)] == ["large", "same", "large"]


def test_requests_of_one_width_have_equal_shares_of_a_forward() -> None:
    queue = queued(48, job("a", *[8] * 9), job("b", *[8] * 9), job("c", 8))
    shares = [[id for id, _ in lengths(queue.take())] for _ in range(4)]
    assert shares == [list("abcaba"), list("bababa"), list("ababab"), ["b"]]


def test_other_weights_are_another_forward() -> None:
    slot, apart = Placement(0, 3), Placement(1, 0)
    queue = queued(512, job("a", 8), job("b", 8, placement=apart), job("c", 8, placement=slot))
    assert lengths(queue.take()) == [("a", 8), ("c", 8)]
    assert lengths(queue.take()) == [("b", 8)]


def test_what_is_closed_is_not_read() -> None:
    first, second = job("a", 8, 8), job("b", 60, 8)
    queue = queued(8, first, second)
    assert lengths(queue.take()) == [("a", 8)]
    queue.close(first)
    assert queue.of("a") == () and queue.jobs == (second,)
    assert lengths(queue.take()) == [("b", 60)]
    queue.close(second)
    assert queue.take() is None and not queue.busy


def test_no_width_exceeds_what_the_model_reads() -> None:
    """A bucket beyond it would keep sequences apart that are padded to the same width."""
    queue = queued(512, job("a", 99, 97, 100))
    assert [length for _, length in lengths(queue.take())] == [99, 97, 100]
