"""`serve --trace FILE`: every part of a turn lies inside it, and tokens add up."""

from __future__ import annotations

import itertools
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from rollout_server.errors import RolloutError
from tests.support import tiny_models
from tests.support.live_server import live_server, server_here
from trainer_client import RolloutClient

PROMPTS = [[5, 9, 33], [100, 20, 7, 8, 9, 10, 11, 250], [44] * 40]
ASKED: dict[str, Any] = {"n": 2, "max_tokens": 12, "ignore_eos": True}
ROUNDING_US = 0.15


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_models.build("qwen3", tmp_path / "qwen3")


def spans(events: list[dict[str, Any]], track: str) -> list[dict[str, Any]]:
    """Complete events of the track with this name."""
    ids = {each["tid"] for each in events if each["name"] == "thread_name" and each["args"]["name"] == track}
    return [event for event in events if event["ph"] == "X" and event["tid"] in ids]


def inside(part: dict[str, Any], whole: dict[str, Any]) -> bool:
    end = part["ts"] + part["dur"]
    return bool(whole["ts"] <= part["ts"] + ROUNDING_US and end <= whole["ts"] + whole["dur"] + ROUNDING_US)


def test_a_server_records_its_turns_and_pushes(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    adapter = tiny_models.save_adapter(
        tmp_path / "adapter", *tiny_models.random_adapter(tiny_models.linear_layers(model), 4, 1)
    )
    with (
        server_here(model, trace=path, prefix_cache="off", state_dir=tmp_path / "state") as live,
        RolloutClient(live.url) as client,
    ):
        tokens = len(client.rollouts(PROMPTS, **ASKED).token_ids)
        pushed = client.push("policy", adapter)
        tokens += len(client.rollouts(PROMPTS, policy="policy", **ASKED).token_ids)
        scored = client.logprobs(client.rollouts(PROMPTS, policy=pushed, **ASKED))
        tokens += len(scored.logprobs)

    events = json.loads(path.read_text("utf-8"))
    turns = spans(events, "turns")
    whole = [event for event in turns if event["name"] == "turn"]
    parts = [event for event in turns if event["name"] not in ("turn", "load", "warm")]
    assert {"take", "apply", "change versions", "read", "score", "step", "build", "hand over", "settle"} <= {
        part["name"] for part in parts
    }
    assert all(sum(inside(part, turn) for turn in whole) == 1 for part in parts)
    assert all(one["ts"] + one["dur"] <= other["ts"] + ROUNDING_US for one, other in itertools.pairwise(whole))

    def total(name: str, what: str) -> int:
        # A step that dispatches nothing, and only reads the one before it, has no rows.
        return sum(part.get("args", {}).get(what, 0) for part in parts if part["name"] == name)

    # The last token of a prompt is the input of its rows' first step.
    assert total("read", "tokens") == 3 * sum(len(prompt) - 1 for prompt in PROMPTS)
    assert total("step", "rows") == total("settle", "rows") == tokens
    assert total("score", "tokens") > 0

    stages = spans(events, "pushes")
    # With a state directory a version is staged, written, and then published.
    assert [stage["name"] for stage in stages] == [
        "receive",
        "validate",
        "persist",
        "stage and publish",
        "push",
        "persist",
        "stage and publish",
        "push",
    ]
    assert {stage["args"]["policy"] for stage in stages} == {"policy"}


@pytest.mark.long
def test_a_killed_server_leaves_a_timeline_that_opens(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with live_server(model, "--trace", str(path)) as live, RolloutClient(live.url) as client:
        client.rollouts(PROMPTS, **ASKED)
        client.rollouts(PROMPTS, **ASKED)
        live.process.send_signal(signal.SIGKILL)
        live.process.wait()
    events = json.loads(path.read_text("utf-8") + "]")
    # All of the first request: its turns were over before the second one was taken.
    assert sum(event["args"]["rows"] for event in events if event["name"] == "settle") >= 2 * 3 * 12


def test_a_file_that_cannot_be_made_ends_the_start_with_a_sentence(model: Path, tmp_path: Path) -> None:
    told = pytest.raises(RolloutError, match=r"The timeline cannot be written to .*nowhere")
    with told, server_here(model, trace=tmp_path / "nowhere" / "trace.json"):
        raise AssertionError("the server started")
