"""The ledger's rules, one at a time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from rollout_server.fleet.ledger.ledger import FLIP_S, GIVE_UP_S, MOST_DEATHS, SILENT_S, STAGE_S, Ledger
from rollout_server.fleet.ledger.records import (
    Action,
    Attempt,
    Dispatch,
    End,
    Flip,
    Lose,
    ReplicaState,
    Settle,
    Stage,
    Work,
)


def fleet(count: int = 2, room: int = 8) -> Ledger:
    ledger = Ledger()
    for index in range(count):
        ledger.join(f"r{index}", room, 0.0)
    assert {replica.state for replica in ledger.replicas.values()} == {ReplicaState.LIVE}
    return ledger


def work(key: int = 0, samples: int = 2, **more: object) -> Work:
    return Work(key, "trained", (key,) * 40, samples, **more)  # type: ignore[arg-type]


def taken(ledger: Ledger, kind: type[Action]) -> list[Action]:
    return [action for action in ledger.take() if isinstance(action, kind)]


def dispatched(ledger: Ledger) -> list[Attempt]:
    return [action.attempt for action in ledger.take() if isinstance(action, Dispatch)]


def push(ledger: Ledger, number: int, replicas: Sequence[str] = ("r0", "r1"), now: float = 0.0) -> bool:
    """Stages and flips where `replicas` answer; whether both phases are done."""
    version = ("trained", number)
    staged = ledger.stage(version, 0, now)
    for id in replicas:
        ledger.staged(id, version)
    flipped = ledger.flip(version, now)
    for id in replicas:
        ledger.flipped(id, version)
    done = {action.change for action in taken(ledger, Settle) if isinstance(action, Settle)}
    return {staged, flipped} <= done


def test_a_group_is_never_split_and_goes_where_there_is_least_to_do() -> None:
    ledger = fleet()
    for key in range(4):
        ledger.submit(Work(key, "trained", (key,), 4))
    ledger.submit(Work(4, "trained", (4,), 4))
    attempts = dispatched(ledger)
    assert [attempt.replica for attempt in attempts] == ["r0", "r1", "r0", "r1"]
    assert all(attempt.samples == (0, 1, 2, 3) for attempt in attempts)
    assert [waiting.key for waiting in ledger.waiting] == [4], "no replica has room"
    for sample in range(4):
        assert ledger.row(attempts[1].number, sample)
    ledger.over(attempts[1].number)
    assert [(attempt.work.key, attempt.replica) for attempt in dispatched(ledger)] == [(4, "r1")]


def test_a_prompt_follows_its_beginning_unless_that_replica_has_much_more_to_do() -> None:
    ledger = fleet(room=100)
    turn = tuple(range(100))
    ledger.submit(Work(0, "trained", (7,), 1))
    ledger.submit(Work(1, "trained", turn, 1))
    ledger.submit(Work(2, "trained", (8,), 3))
    assert [attempt.replica for attempt in dispatched(ledger)] == ["r0", "r1", "r0"]
    ledger.submit(Work(3, "trained", (*turn, *turn), 4))
    (attempt,) = dispatched(ledger)
    assert attempt.replica == "r1"
    ledger.submit(Work(4, "trained", (*turn, 5), 20))
    ledger.submit(Work(5, "trained", (*turn, 6), 1))
    assert [attempt.replica for attempt in dispatched(ledger)] == ["r1", "r0"], "25 rows there, and 4 here"
    ledger.submit(Work(6, "other", turn, 1))
    assert dispatched(ledger)[0].replica == "r0", "another policy has KV of its own"


def test_a_prompt_follows_its_beginning_no_further_than_its_kv() -> None:
    """KV is of one version, and gone once somebody has it freed."""
    ledger = fleet(room=100)
    turn = tuple(range(100))

    def goes(key: int, number: int | None = None) -> str:
        ledger.submit(Work(key, "trained", (*turn, key), 1, number=number))
        return dispatched(ledger)[0].replica

    assert push(ledger, 1)
    ledger.submit(Work(0, "trained", (7,), 1))
    dispatched(ledger)
    assert goes(1) == "r1" and goes(2) == "r1"
    assert push(ledger, 2)
    assert goes(3) == "r0", "one row there, and two here"
    assert goes(4) == "r0" and goes(5) == "r0", "it was read there under version 2"
    assert goes(6, number=1) == "r1" and goes(7, number=1) == "r1" and goes(8, number=1) == "r1"
    assert goes(9, number=2) == "r0" and goes(10) == "r0"
    ledger.forget_prefixes()
    assert goes(11) == "r1", "six rows there, and five here"


def test_a_late_replica_gets_no_rows_before_it_has_moved_its_alias_there_and_back() -> None:
    """Where the alias went to a version and back, a replica that has done neither looks as if it had done both."""
    ledger = fleet()
    push(ledger, 1)
    ledger.stage(("trained", 2), 0, 0.0)
    for id in ("r0", "r1"):
        ledger.staged(id, ("trained", 2))
    for number in (2, 1):
        ledger.flip(("trained", number), 0.0)
        ledger.flipped("r0", ("trained", number))
        ledger.tick(FLIP_S)
        ledger.drop(())
        assert ledger.replicas["r1"].state is ReplicaState.FENCED
    ledger.flipped("r1", ("trained", 2))
    assert ledger.replicas["r1"].state is ReplicaState.FENCED
    ledger.flipped("r1", ("trained", 1))
    assert ledger.replicas["r1"].state is ReplicaState.LIVE


def test_who_is_late_with_a_flip_is_fenced_before_the_push_is_told() -> None:
    ledger = fleet()
    assert push(ledger, 1)
    for key in range(2):
        ledger.submit(work(key))
    admitted, queued = dispatched(ledger)
    ledger.admitted(admitted.number, ("trained", 1))
    late, quick = admitted.replica, queued.replica
    version = ("trained", 2)
    ledger.stage(version, 0, 0.0)
    for id in (late, quick):
        ledger.staged(id, version)
    ledger.take()
    change = ledger.flip(version, 0.0)
    ledger.flipped(quick, version)
    ledger.submit(work(2))
    ledger.tick(FLIP_S - 0.01)
    assert Settle(change) not in ledger.take()
    ledger.tick(FLIP_S)
    actions = ledger.take()
    assert Settle(change) in actions and ledger.replicas[late].state is ReplicaState.FENCED
    assert [a.attempt.replica for a in actions if isinstance(a, Dispatch)] == [quick], "what it had not admitted"
    assert ledger.row(admitted.number, 0), "what it had admitted before goes on"
    ledger.submit(work(3))
    assert {attempt.replica for attempt in dispatched(ledger)} == {quick}
    ledger.flipped(late, version)
    assert ledger.replicas[late].state is ReplicaState.LIVE


def test_where_all_are_busy_a_push_waits() -> None:
    ledger = fleet()
    ledger.stage(("trained", 1), 0, 0.0)
    ledger.tick(SILENT_S - 1)
    assert {replica.state for replica in ledger.replicas.values()} == {ReplicaState.LIVE}
    assert not taken(ledger, Settle)
    ledger.tick(SILENT_S + 1)
    assert len(taken(ledger, End)) == 2, "they do not answer either"


def test_one_that_was_drained_is_given_up_and_stays_away() -> None:
    ledger = fleet()
    ledger.submit(work())
    (attempt,) = dispatched(ledger)
    ledger.admitted(attempt.number, ("base", 0))
    ledger.stage(("trained", 1), 0, 0.0)
    ledger.drain(attempt.replica)
    ledger.take()
    for id in ledger.replicas:
        ledger.heard(id, STAGE_S + GIVE_UP_S)
    ledger.tick(STAGE_S + GIVE_UP_S)
    ended = [action for action in ledger.take() if isinstance(action, End)]
    assert {end.replica: end.anew for end in ended} == {id: id != attempt.replica for id in ledger.replicas}


def test_what_no_replica_does_is_given_up_and_they_are_started_anew() -> None:
    """Their engines answer all the while: it is what makes versions ready beside them that hangs."""
    ledger = fleet()
    ledger.submit(work())
    (attempt,) = dispatched(ledger)
    change = ledger.stage(("trained", 1), 0, 0.0)
    ledger.take()
    for id in ledger.replicas:
        ledger.heard(id, STAGE_S + GIVE_UP_S)
    ledger.tick(STAGE_S + GIVE_UP_S - 1.0)
    assert not ledger.take() and len(ledger.in_state(ReplicaState.LIVE)) == 2
    ledger.tick(STAGE_S + GIVE_UP_S)
    actions = ledger.take()
    ended = [action for action in actions if isinstance(action, End)]
    assert [(end.replica, end.anew) for end in ended] == [("r0", True), ("r1", True)]
    assert ended[0].reason == "it has not staged trained@1 in 320 s"
    assert Settle(change) in actions and not ledger.in_state(ReplicaState.LIVE), "whoever pushed is told"
    ledger.lost(attempt.replica)
    assert attempt.work.deaths == 0, "its rows have not ended it"


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("goes", ["dies", "is silent"])
def test_whoever_is_left_is_not_late_because_another_one_is_gone(goes: str, staged: bool) -> None:
    """Nobody who could serve has done it, whether or not the one that is gone had."""
    ledger = fleet()
    ledger.stage(("trained", 1), 0, 0.0)
    if staged:
        ledger.staged("r0", ("trained", 1))
    ledger.heard("r1", STAGE_S)
    if goes == "dies":
        ledger.lost("r0")
        ledger.remove("r0")
    ledger.tick(STAGE_S + 1.0)
    assert ledger.replicas["r1"].state is ReplicaState.LIVE and not taken(ledger, Settle)
    ledger.staged("r1", ("trained", 1))
    assert taken(ledger, Settle)


def test_lost_rows_go_elsewhere_alone_under_their_version() -> None:
    ledger = fleet()
    assert push(ledger, 1)
    ledger.submit(work(samples=3))
    (first,) = dispatched(ledger)
    ledger.admitted(first.number, ("trained", 1))
    assert ledger.row(first.number, 1) and not ledger.row(first.number, 1)
    other = "r1" if first.replica == "r0" else "r0"
    ledger.lost(first.replica)
    (second,) = dispatched(ledger)
    assert (second.replica, second.samples, second.pinned) == (other, (0, 2), ("trained", 1))
    assert not ledger.row(first.number, 0), "nobody listens to the dead"
    assert ledger.row(second.number, 0) and ledger.row(second.number, 2)


def test_work_that_ends_replicas_is_given_up() -> None:
    ledger = fleet(MOST_DEATHS + 1)
    ledger.submit(work())
    for death in range(MOST_DEATHS):
        (attempt,) = dispatched(ledger)
        ledger.lost(attempt.replica)
        assert ledger.replicas[attempt.replica].state is ReplicaState.DEAD and attempt.work.deaths == death + 1
    (lost,) = taken(ledger, Lose)
    assert isinstance(lost, Lose) and lost.samples == (0, 1) and "3 replicas ended" in lost.reason


@pytest.mark.parametrize(("shown", "lost"), [(False, False), (True, True)])
def test_rows_that_have_gone_over_to_another_version_begin_anew_unless_somebody_saw_them(
    shown: bool, lost: bool
) -> None:
    ledger = fleet()
    assert push(ledger, 1)
    ledger.submit(work(switches=True))
    (attempt,) = dispatched(ledger)
    ledger.admitted(attempt.number, ("trained", 1))
    attempt.work.shown = {0: {1}, 1: {1}} if shown else {}
    assert push(ledger, 2)
    ledger.lost(attempt.replica)
    actions = ledger.take()
    assert any(isinstance(action, Lose) for action in actions) == lost
    again = [action.attempt.pinned for action in actions if isinstance(action, Dispatch)]
    assert again == ([] if lost else [None])


def test_a_row_somebody_saw_under_two_versions_is_lost_alone_though_its_name_came_back() -> None:
    ledger = fleet()
    assert push(ledger, 1)
    ledger.submit(work(samples=3, switches=True))
    (attempt,) = dispatched(ledger)
    ledger.admitted(attempt.number, ("trained", 1))
    assert push(ledger, 2)
    attempt.work.shown = {0: {1, 2}, 1: {1}}
    for id in ("r0", "r1"):
        ledger.flip(("trained", 1), 0.0)
        ledger.flipped(id, ("trained", 1))
    ledger.take()
    ledger.lost(attempt.replica)
    lost, again = ledger.take()
    assert isinstance(lost, Lose) and lost.samples == (0,) and "moved on" in lost.reason
    assert isinstance(again, Dispatch) and (again.attempt.samples, again.attempt.pinned) == ((1, 2), ("trained", 1))


def test_a_group_whose_rows_have_all_come_is_over_where_its_replica_ends_before_it_says_so() -> None:
    ledger = fleet()
    ledger.submit(work(samples=1))
    (attempt,) = dispatched(ledger)
    assert ledger.row(attempt.number, 0)
    ledger.lost(attempt.replica)
    (told,) = ledger.take()
    assert isinstance(told, Lose) and (told.work, told.samples) == (attempt.work, ())


def test_a_newcomer_is_brought_even_before_it_gets_rows() -> None:
    ledger = fleet(1)
    assert push(ledger, 1, ["r0"]) and push(ledger, 2, ["r0"])
    ledger.drop([("trained", 1)])
    ledger.join("r1", 8, 1.0)
    sent = [action for action in ledger.take() if isinstance(action, Stage | Flip) and action.replica == "r1"]
    assert sent == [Stage("r1", ("trained", 2)), Flip("r1", ("trained", 2))]
    change = ledger.stage(("trained", 3), 0, 1.0)
    ledger.staged("r1", ("trained", 2))
    ledger.flipped("r1", ("trained", 2))
    assert ledger.replicas["r1"].state is ReplicaState.RESTORING, "version 3 is kept now, too"
    ledger.staged("r0", ("trained", 3))
    assert Settle(change) in ledger.take(), "a push waits for nobody who gets no rows"
    ledger.staged("r1", ("trained", 3))
    assert ledger.replicas["r1"].state is ReplicaState.LIVE


def test_a_drained_replica_finishes_what_it_has() -> None:
    ledger = fleet()
    ledger.submit(work(0))
    ledger.submit(work(1))
    first, second = dispatched(ledger)
    ledger.admitted(first.number, ("trained", 1))
    ledger.drain(first.replica)
    assert not taken(ledger, End)
    ledger.drain(second.replica)
    actions = ledger.take()
    assert End(second.replica, "it was drained", drained=True) in actions, "its group waits for another replica"
    assert [waiting.key for waiting in ledger.waiting] == [1]
    for sample in (0, 1):
        ledger.row(first.number, sample)
    ledger.over(first.number)
    assert End(first.replica, "it was drained", drained=True) in ledger.take()


def test_replicas_that_were_told_to_go_are_no_deaths_of_what_they_had() -> None:
    ledger = fleet(1)
    ledger.submit(work())
    for start in range(MOST_DEATHS + 1):
        (attempt,) = dispatched(ledger)
        ledger.admitted(attempt.number, ("trained", 0))
        ledger.leaves("r0") if start % 2 else ledger.drain("r0")
        ledger.lost("r0")
        ledger.remove("r0")
        assert not taken(ledger, Lose) and attempt.work.deaths == 0
        ledger.join("r0", 8, 0.0)


def test_a_replica_that_is_drained_answers_what_it_reads_before_it_ends() -> None:
    ledger = fleet(1)
    ledger.reads("r0", "one")
    ledger.reads("r0", "two")
    ledger.drain("r0")
    ledger.has_read("r0", "one")
    assert not taken(ledger, End)
    ledger.has_read("r0", "two")
    assert taken(ledger, End) == [End("r0", "it was drained", drained=True)]
