"""The rules of the nouns: what a request may say, how a policy is addressed, and what seeds follow from one."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rollout_server.errors import InvalidField, UnknownPolicy
from rollout_server.rollout import (
    MAX_SEED,
    MAX_STOP_STRINGS,
    PolicyAddress,
    PolicyVersion,
    Prefix,
    RolloutRequest,
    RowReward,
    SamplingParams,
    called,
    row_seed,
)

NAN, INFINITY = math.nan, math.inf


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("max_tokens", [1], [0]),
        ("min_tokens", [0, 8], [-1, 9]),
        ("temperature", [0, 1e-3, 100], [-1, 9e-4, 101, NAN, INFINITY]),
        ("top_p", [1e-9, 1], [0, 1.1, NAN]),
        ("top_k", [0, 2**31 - 1], [-1, 2**31]),
        ("min_p", [0, 1], [-0.1, 1.1, NAN]),
        ("presence_penalty", [-2, 2], [-2.1, 2.1, NAN]),
        ("frequency_penalty", [-2, 2], [-2.1, 2.1, NAN]),
        ("repetition_penalty", [0.01, 100], [0, 101, NAN]),
        ("logit_bias", [((1, -100.0), (2, 100.0))], [((1, 101.0),), ((1, NAN),), ((1, 1.0), (1, 2.0))]),
        ("stop", [("a",) * MAX_STOP_STRINGS], [("a",) * (MAX_STOP_STRINGS + 1), ("a", "")]),
    ],
)
def test_the_edges_of_every_domain(name: str, inside: list[Any], outside: list[Any]) -> None:
    usual = {"max_tokens": 8}
    for value in inside:
        assert getattr(SamplingParams(**(usual | {name: value})), name) == value
    for value in outside:
        with pytest.raises(InvalidField, match=f"^{name} must be ") as caught:
            SamplingParams(**(usual | {name: value}))
        assert caught.value.param == name


def test_what_a_row_s_step_may_leave_out() -> None:
    assert not SamplingParams(1).penalised and not SamplingParams(1).filtered
    assert SamplingParams(1, presence_penalty=-1.0).penalised
    assert SamplingParams(1, frequency_penalty=0.1).penalised
    assert SamplingParams(1, repetition_penalty=0.9).penalised
    assert SamplingParams(1, top_p=0.9, top_k=3, min_p=0.1).filters == ("top_p", "top_k", "min_p")
    assert SamplingParams(1, top_k=3).filters == ("top_k",)
    assert not SamplingParams(1, temperature=0, top_p=0.9, top_k=3, min_p=0.1).filtered, "greedy rows need none"


@pytest.mark.parametrize(
    ("text", "address", "follows"),
    [
        ("policy", PolicyAddress("policy"), True),
        ("base", PolicyAddress("base"), False),
        ("p.1_a-B@0", PolicyAddress("p.1_a-B", 0), False),
        ("policy@7", PolicyAddress("policy", 7), False),
        ("policy@sha256:01234567", PolicyAddress("policy", digest="sha256:01234567"), False),
        ("a" * 64, PolicyAddress("a" * 64), True),
    ],
)
def test_an_address_is_read_and_written_the_same(text: str, address: PolicyAddress, follows: bool) -> None:
    assert PolicyAddress.parse(text) == address
    assert str(address) == text
    assert address.follows is follows


@pytest.mark.parametrize("text", ["", "@7", ".policy", "-", "a b", "a/b", "é", "a" * 65, "policy\n"])
def test_what_can_be_no_name_is_no_policy(text: str) -> None:
    with pytest.raises(UnknownPolicy):
        PolicyAddress.parse(text)


@pytest.mark.parametrize(
    "rest",
    ["", "07", "-1", "1.0", "1" * 13, "latest", "sha256:0123456", "sha256:ABCDEF01", f"sha256:{'0' * 65}", "7\n"],
)
def test_what_can_be_no_version_is_refused_by_its_field(rest: str) -> None:
    with pytest.raises(InvalidField, match="names no version") as caught:
        PolicyAddress.parse(f"policy@{rest}", param="model")
    assert caught.value.param == "model"


def test_a_version_is_called_by_its_model_where_there_are_several() -> None:
    assert [called("policy", ""), called("base", "")] == ["policy", "base"]
    assert [called("policy", "judge"), called("base", "judge")] == ["judge/policy", "judge"]
    assert str(PolicyVersion("policy", 7, "sha256:0", resident="judge")) == "judge/policy@7"


def test_rows_of_equal_prompts_have_seeds_of_their_own_and_the_first_has_the_request_s() -> None:
    seeds = [row_seed(MAX_SEED, prompt, sample) for prompt in range(20) for sample in range(20)]
    assert seeds[0] == MAX_SEED and len(set(seeds)) == len(seeds)
    assert all(0 <= seed <= MAX_SEED for seed in seeds), "JSON holds them exactly"
    # Whoever kept a request's seed draws the same rows under the next release: bits of SHA-256 of "0/0/1".
    assert row_seed(0, 0, 1) == 3767543414644861


def request_of(**fields: Any) -> RolloutRequest:
    usual: dict[str, Any] = {"sampling": SamplingParams(2), "policy": PolicyAddress("policy"), "seeds": (0, 1), "n": 2}
    return RolloutRequest("r", fields.pop("prompt_ids", (1,)), **(usual | fields))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt_ids": ()}, "prompt"),
        ({"n": 0, "seeds": ()}, "n"),
        ({"seeds": (0,)}, "seed"),
        ({"return_when": 0}, "return_when"),
        ({"return_when": 3}, "return_when"),
        ({"prefix": Prefix((1, 2), (0.0,) * 2, (0.0,) * 2, (1, 1), ())}, "max_tokens"),
    ],
)
def test_a_request_that_contradicts_itself_names_the_field(fields: dict[str, Any], param: str) -> None:
    request_of(return_when=2, prefix=Prefix((1,), (0.0,), (0.0,), (1,), ()))  # as far as it goes
    with pytest.raises(InvalidField) as caught:
        request_of(**fields)
    assert caught.value.param == param


def test_a_reward_is_one_number_only_where_there_is_one_label() -> None:
    assert RowReward((0.5,)).value == 0.5
    assert RowReward((0.5, 1.0)).value is None and RowReward().value is None
