"""What a stream of frames tells, merged as the page merges it, is at every moment the whole frame."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import msgspec
from litestar.testing import TestClient

from rollout_server.engine.messages.control import RowSeen
from rollout_server.http.page.differences import Frame
from rollout_server.http.page.frames import Frames
from rollout_server.rollout import PolicyVersion
from tests.support.http.fake_engine import FakeEngine

Client = TestClient[Any]
SAMPLE = {"now"}
"""Told in each frame, but for two of one millisecond."""


def said(content: object) -> Any:
    return msgspec.json.decode(msgspec.json.encode(content))


def filled(told: list[Any], before: list[Any], key: str) -> list[Any]:
    known = {item[key]: item for item in before}
    return [item if isinstance(item, dict) else known[item] for item in told]


def merged(before: dict[str, Any], event: dict[str, Any]) -> dict[str, Any]:
    """As `static/frames.js` does it; moves are those since the frame before."""
    known = {policy["name"]: policy for policy in before.get("policies", [])}
    frame = {**before, **event}
    if "rollouts" in event:
        frame["rollouts"] = filled(event["rollouts"], before.get("rollouts", []), "number")
    if "policies" in event:
        frame["policies"] = [
            known[policy]
            if isinstance(policy, str)
            else policy
            | {
                "versions": filled(
                    policy["versions"], known.get(policy["name"], {"versions": []})["versions"], "version"
                )
            }
            for policy in event["policies"]
        ]
    return frame


def frames_of(client: Client) -> Frames:
    found: Frames = client.app.state["frames"]["base"]
    return found


def test_what_is_told_since_a_frame_makes_the_next_one_of_it(
    client: Client, engine: FakeEngine, push: Callable[..., Any], adapter: Callable[..., bytes]
) -> None:
    now = partial(client.blocking_portal.call, partial(frames_of(client).frame, fresh=True))
    version = PolicyVersion("one", 1, "sha256:" + "c" * 64)

    def sample(policy: str) -> None:
        client.post("/v1/rollouts", json={"policy": policy, "prompts": [{"text": "a"}], "sampling": {"max_tokens": 4}})

    steps: list[Callable[[], object]] = [
        lambda: None,
        lambda: push("one"),
        lambda: push("two", weights=adapter(1), label="<b>"),
        lambda: push("one", weights=adapter(2)),
        lambda: sample("one"),
        lambda: sample("base"),
        lambda: client.post("/v1/weights/one/activate", json={"version": 1}),
        lambda: client.patch("/v1/weights/one/2", json={"pinned": True}),
        lambda: setattr(engine, "seen", [RowSeen("r", 0, 0, version, 5, 10, preempted=False)]),
        lambda: [sample("two") for _ in range(40)],
        lambda: client.delete("/v1/weights/one"),
        lambda: push("one", weights=adapter(3)),
        lambda: setattr(engine, "state", "dead"),
    ]
    before = Frame()
    seen: dict[str, Any] = {}
    moves: list[Any] = []
    for step in steps:
        step()
        frame = now()
        event = said(frame.told(before))
        moves += event["moves"]
        seen = merged(seen, event)
        whole = said(frame.told(Frame()))
        assert moves == whole["moves"]
        assert seen | {"moves": None} == whole | {"moves": None}
        before = frame


def test_what_stays_as_it_was_is_not_told(
    client: Client, push: Callable[..., Any], adapter: Callable[..., bytes]
) -> None:
    now = partial(client.blocking_portal.call, partial(frames_of(client).frame, fresh=True))
    push("one"), push("two", weights=adapter(1)), push("two", weights=adapter(2))
    for _ in range(3):
        client.post("/v1/rollouts", json={"policy": "base", "prompts": [{"text": "a"}]})
    first = now()
    assert said(now().told(first)).keys() - SAMPLE == {"moves"}
    client.post("/v1/weights/two/activate", json={"version": 1})
    client.post("/v1/rollouts", json={"policy": "one", "prompts": [{"text": "a"}]})
    event = said(now().told(first))
    one, two = event["policies"]
    assert [kept["version"] for kept in one["versions"]] == [1] and one["versions"][0]["totals"]["rows"] == 1
    assert [kept["version"] for kept in two["versions"]] == [1, 2], "which is live is said of each"
    assert [rollout if isinstance(rollout, int) else rollout["number"] for rollout in event["rollouts"]] == [4, 3, 2, 1]
    assert [isinstance(rollout, int) for rollout in event["rollouts"]] == [False, True, True, True]
    assert event.keys() - SAMPLE == {"moves", "policies", "rollouts"}


def test_all_who_look_are_told_by_one_event(client: Client) -> None:
    """Wherever between two frames a stream was opened, it is told the later ones with the others, as the same bytes."""
    frames = frames_of(client)

    async def look() -> list[list[bytes]]:
        streams: list[AsyncIterator[bytes]] = [frames.stream() for _ in range(3)]
        return [list(await asyncio.gather(*map(anext, streams))) for _ in range(3)]

    opened, first, later = client.blocking_portal.call(look)
    assert all("history" in json.loads(event.removeprefix(b"data: ")) for event in opened)
    assert all("history" not in json.loads(event.removeprefix(b"data: ")) for event in first + later)
    assert later[0] is later[1] is later[2]
