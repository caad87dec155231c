"""The ring of the latest rollouts: how many, how many bytes, and what is left out of them."""

from __future__ import annotations

from dataclasses import replace

from rollout_server.http.observing.latest_rollouts import STRIP, LatestRollouts
from rollout_server.rollout import FinishReason, PolicyVersion, Rollout, SamplingParams, Span, Timings

VERSION = PolicyVersion("policy", 1, "sha256:" + "c" * 64)


def rollout(tokens: int, prompt: int = 2) -> Rollout:
    values = tuple(-0.5 * at for at in range(tokens))
    return Rollout(
        0, 0, (7,) * prompt, tuple(range(tokens)), values, values, values, (Span(VERSION, 0, tokens),),
        FinishReason.LENGTH, None, 1, SamplingParams(tokens + 1), Timings(0.0, 0.0, 0.0),
    )  # fmt: skip


def test_the_oldest_make_room() -> None:
    latest = LatestRollouts(most=3)
    for index in range(5):
        latest.add(f"r{index}", rollout(4))
    assert [(kept.number, kept.request_id) for kept in latest] == [(5, "r4"), (4, "r3"), (3, "r2")]
    assert latest.find(2) is None and latest.find(3) is not None


def test_bytes_are_bounded_whatever_the_rows_length() -> None:
    """A float of a tuple takes 32 bytes, an array of n tokens 32 n: five arrays and the prompt are counted."""
    one = 32 * (2 + 5 * 100)
    latest = LatestRollouts(most=1000, most_bytes=3 * one)
    for _ in range(10):
        latest.add("r", rollout(100))
        assert latest.nbytes <= 3 * one
    assert len(list(latest)) == 3


def test_nothing_makes_room_for_one_that_is_larger_than_all_of_it() -> None:
    one = 32 * (2 + 5 * 100)
    latest = LatestRollouts(most_bytes=3 * one)
    for _ in range(3):
        latest.add("r", rollout(100))
    latest.add("long", rollout(10_000))
    assert [kept.number for kept in latest] == [3, 2, 1] and latest.nbytes == 3 * one
    latest.add("r", rollout(100))
    assert [kept.number for kept in latest] == [5, 3, 2], "it was counted"


def test_what_is_large_and_never_shown_is_let_go() -> None:
    latest = LatestRollouts()
    whole = replace(rollout(2), top_logprobs=(((1, -0.5),), None), prompt_logprobs=(None, -1.0))
    latest.add("r", whole)
    kept = next(iter(latest)).rollout
    assert kept.top_logprobs is None and kept.prompt_logprobs is None and kept.logprobs == whole.logprobs


def test_a_strip_has_a_mean_for_each_of_its_parts() -> None:
    latest = LatestRollouts()
    latest.add("short", rollout(3))
    latest.add("long", rollout(2 * STRIP))
    long, short = [kept.strip for kept in latest]
    assert short == (0.0, -0.5, -1.0)
    assert long == tuple(-0.5 * (2 * at + 0.5) for at in range(STRIP))
