"""The page over HTTP: its files, who may see what, and what a frame says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from litestar.testing import TestClient

from rollout_server.config import ServerConfig
from rollout_server.demo.run import model_directory
from rollout_server.engine.messages.control import RowSeen
from rollout_server.http.app import create_app, residents_for
from rollout_server.http.page.assets import assets
from rollout_server.http.page.frames import Frames
from rollout_server.rollout import FinishReason, PolicyVersion
from tests.http.observing.test_version_totals import rollout
from tests.support.http.fake_engine import FakeEngine, Row, logprob, sampling_logprob
from tests.support.http.fixtures import PEFT_CONFIG, MakeApp
from tests.support.live_server import until

Client = TestClient[Any]
MOST_BYTES = 150_000
MARKUP = "<img src=x onerror=alert(1)>"


def frame(client: Client) -> dict[str, Any]:
    response = client.get("/page/state")
    assert response.status_code == 200, response.text
    return dict(response.json())


def test_the_page_is_small_and_names_no_other_place() -> None:
    files = assets()
    assert sum(len(asset.content) for asset in files.values()) <= MOST_BYTES
    for name, asset in files.items():
        text = asset.content.decode()
        # The name of SVG's own namespace is fetched by nobody.
        text = text.replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text and "https://" not in text and "//cdn" not in text, name
        assert "innerHTML" not in text and "insertAdjacentHTML" not in text and "eval(" not in text, name
    index = files["index.html"].content.decode()
    assert "style=" not in index and "onclick=" not in index, "the policy forbids what stands in the markup"


def test_nothing_on_the_page_moves_by_itself() -> None:
    """What moves between two events is drawn 60 times a second: it took a third of a core of whoever looked, which is
    often the machine that samples."""
    style = assets()["page.css"].content.decode()
    assert not [word for word in ("transition", "animation", "@keyframes") if word in style]
    for name, asset in assets().items():
        text = asset.content.decode()
        assert "requestAnimationFrame" not in text and "setInterval" not in text and ".animate(" not in text, name


def test_every_file_comes_under_a_strict_policy(client: Client) -> None:
    for path in ("/", *[f"/page/files/{name}" for name in assets()]):
        response = client.get(path)
        assert response.status_code == 200, path
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        again = client.get(path, headers={"if-none-match": response.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert client.get("/").headers["content-type"].startswith("text/html")
    assert client.get("/page/files/app.js").headers["content-type"].startswith("text/javascript")


@pytest.mark.parametrize("name", ["nothing.js", "..", "__init__.py", "%2e%2e"])
def test_only_the_page_s_own_files_are_served(client: Client, name: str) -> None:
    assert client.get(f"/page/files/{name}").status_code == 404


def test_page_off_serves_none(engine: FakeEngine) -> None:
    with TestClient(create_app(ServerConfig(page="off"), engine)) as client:  # type: ignore[arg-type]
        for path in ("/", "/page/state", "/page/events", "/page/files/app.js", "/page/rollouts/1"):
            assert client.get(path).status_code == 404, path
        sampled = client.post("/v1/rollouts", json={"policy": "base", "prompts": [{"token_ids": [1, 2]}]})
        observer = client.app.state["service"].observer
        assert sampled.status_code == 200 and observer.versions.of("base", 0).rows == 1, "it was seen"
        assert not list(observer.rollouts), "and not kept"


def test_a_key_opens_what_the_page_shows_and_nothing_else_does(engine: FakeEngine, problem: Callable[..., Any]) -> None:
    config = ServerConfig(api_key="secret-1", admin_key="secret-2")  # type: ignore[arg-type]
    with TestClient(create_app(config, engine)) as client:  # type: ignore[arg-type]
        assert client.get("/").status_code == 200
        for path in ("/page/state", "/page/events", "/page/rollouts/1"):
            problem(client.get(path), 401, "unauthorized")
        for key in ("secret-1", "secret-2"):
            response = client.get("/page/state", headers={"authorization": f"Bearer {key}"})
            assert response.json()["keys"] == {"inference": True, "administration": True, "changes": True}
            assert response.headers["cache-control"] == "no-store"
            assert "secret" not in response.text


def test_a_frame_says_what_is_served(client: Client, engine: FakeEngine, push: Callable[..., Any]) -> None:
    reply = push("policy", label=MARKUP).json()
    said = frame(client)
    assert said["state"] == "ready" and said["base"]["id"] == "org/tiny" and said["base"]["chat"] is True
    assert dict(zip(said["fields"], said["now"], strict=True))["kv_filled"] == 256
    (policy,) = said["policies"]
    (kept,) = policy["versions"]
    assert (policy["name"], policy["live"], kept["version"], kept["label"]) == ("policy", 1, 1, MARKUP)
    assert kept["delta_norm"] == reply["report"]["delta_norm"]
    assert kept["timings_ms"] == reply["timings_ms"]
    assert kept["digest"] == reply["digest"] and kept["kind"] == "lora" and kept["totals"] is None


def test_every_move_of_a_name_is_told_once(
    client: Client, push: Callable[..., Any], adapter: Callable[..., bytes]
) -> None:
    """Pushes that follow each other at once are moves of their own; a stream tells later ones only as they come."""
    for seed in range(3):
        push("policy", weights=adapter(seed))
    client.post("/v1/weights/policy/activate", json={"version": 2})
    client.post("/v1/weights/policy/activate", json={"version": 2})
    client.delete("/v1/weights/policy")
    moves = frame(client)["moves"]
    assert [(move["name"], move["number"]) for move in moves] == [("policy", number) for number in (1, 2, 3, 2, None)]
    assert [move["time"] for move in moves] == sorted(move["time"] for move in moves)
    observer = client.app.state["service"].observer
    assert observer.moves_since(3) == (5, list(observer.moves)[3:]) and observer.moves_since(5) == (5, [])


def test_every_door_tells_what_a_version_changes(
    engine: FakeEngine, tokenizer: Any, made_app: MakeApp, adapter: Callable[..., bytes], tmp_path: Path
) -> None:
    """A folder that the server starts with, one that a trainer names, and a state directory at the next start."""
    for name, seed in (("first", 1), ("second", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_bytes(adapter(seed))
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(PEFT_CONFIG))
    state = tmp_path / "state"
    config = ServerConfig(adapters=(("policy", tmp_path / "first"),), adapter_dir=tmp_path, state_dir=state)
    with TestClient(made_app(config, engine)) as client:
        until(lambda: client.get("/ready").status_code == 200)
        body = {"lora_name": "policy", "lora_path": "second", "load_inplace": True}
        assert client.post("/v1/load_lora_adapter", json=body).status_code == 200
        said = frame(client)
        kept = said["policies"][0]["versions"]
        assert [set(each["timings_ms"]) for each in kept] == [{"validate", "stage", "activate", "persist"}] * 2
        assert [move["number"] for move in said["moves"]] == [1, 2]
        assert 'rollout_push_seconds_count{model="base",phase="validate"} 2.0' in client.get("/metrics").text
    norms = [publish.bundle.delta_norm for publish in engine.published if not publish.provisional]
    assert [each["delta_norm"] for each in kept] == norms and norms[0] != norms[1] > 0
    with TestClient(made_app(ServerConfig(state_dir=state), FakeEngine(tokenizer))) as client:
        until(lambda: client.get("/ready").status_code == 200)
        said = frame(client)
        again = said["policies"][0]["versions"]
        assert [each["delta_norm"] for each in again] == norms
        assert [each["timings_ms"] for each in again] == [None, None], "they were another start's"
        assert [move["number"] for move in said["moves"]] == [2]


def test_rows_are_told_by_version(client: Client, engine: FakeEngine) -> None:
    old, new = (PolicyVersion("policy", number, "sha256:" + "c" * 64) for number in (1, 2))
    engine.seen = [
        RowSeen("one", 0, 0, old, 5, 10, preempted=False),
        RowSeen("one", 0, 1, new, 6, 10, preempted=False),
        RowSeen("two", 0, 0, new, 1, 20, preempted=True),
        RowSeen("two", 0, 1, new, 1, 20, preempted=False),
        RowSeen("two", 0, 2, new, 1, 20, preempted=False),
    ]
    assert frame(client)["rows"] == {
        "count": 5,
        "versions": [["policy", 1], ["policy", 2]],
        "counts": [1, 4],
        "requests": ["one", "two"],
        "rows": [[0, 5, 10, 0, 0], [1, 6, 10, 0, 0], [1, 1, 20, 1, 1]],
    }


def test_rows_that_an_engine_does_not_show_in_time_are_not_known(client: Client, engine: FakeEngine) -> None:
    """None would run for all that the page could say of an engine in a long step."""
    version = PolicyVersion("policy", 1, "sha256:" + "c" * 64)
    engine.seen = [RowSeen("one", 0, 0, version, 5, 10, preempted=False)]
    assert frame(client)["rows"]["count"] == 1
    engine.answers = False
    assert frame(client)["rows"] is None
    engine.answers = True
    assert frame(client)["rows"]["count"] == 1


def test_a_rollout_is_shown_as_it_was_sent(client: Client, engine: FakeEngine) -> None:
    """Of every route that samples: what the page shows is what the reply said."""
    engine.script = lambda request, sample: Row([60, 300, 61], FinishReason.STOP, 61)
    body = {
        "id": "mine",
        "policy": "base",
        "prompts": [{"text": MARKUP}],
        "sampling": {"max_tokens": 8},
        "return": ["text", "entropy", "base_logprobs", "sampling_logprobs"],
    }
    sent = client.post("/v1/rollouts", json=body).json()["rollouts"][0]
    (summary,) = frame(client)["rollouts"]
    assert summary["request_id"] == "mine" and summary["spans"] == [["base", 0, 0, 3]] and summary["tokens"] == 3
    shown = client.get(f"/page/rollouts/{summary['number']}").json()
    assert shown["prompt"] == MARKUP and "".join(shown["texts"][:-1]) == sent["text"]
    for name in ("token_ids", "logprobs", "sampling_logprobs", "entropy", "base_logprobs"):
        assert shown[name] == sent[name], name
    totals = frame(client)["base"]["totals"]
    assert totals["tokens"] == 3 and totals["finish_reasons"] == {"stop": 1}
    assert totals["mean_logprob"] == pytest.approx(sum(map(logprob, (60, 300, 61))) / 3)
    pairs = zip((60, 300, 61), sent["base_logprobs"], strict=True)
    assert totals["kl_to_base"] == pytest.approx(sum(logprob(token) - base for token, base in pairs) / 3)
    assert shown["sampling_logprobs"][0] == sampling_logprob(60)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "base", "prompt": "a"}),
        ("/v1/completions", {"model": "base", "prompt": "a", "stream": True}),
        ("/v1/chat/completions", {"model": "base", "messages": [{"role": "user", "content": "a"}]}),
        ("/v1/rollouts", {"policy": "base", "prompts": [{"text": "a"}], "stream": True}),
    ],
    ids=["completions", "streamed completions", "chat", "streamed rollouts"],
)
def test_every_route_that_samples_is_seen(client: Client, path: str, body: dict[str, Any]) -> None:
    assert client.post(path, json=body).status_code == 200
    assert len(frame(client)["rollouts"]) == 1


def test_a_character_of_several_tokens_is_the_last_one_s(client: Client, engine: FakeEngine) -> None:
    ids = engine.tokenizer.encode("é😀", add_special_tokens=False)
    engine.script = lambda request, sample: Row(ids)
    client.post("/v1/rollouts", json={"policy": "base", "prompts": [{"text": "a"}]})
    number = frame(client)["rollouts"][0]["number"]
    texts = client.get(f"/page/rollouts/{number}").json()["texts"]
    assert "".join(texts) == "é😀" and len(texts) == len(ids)


def test_a_rollout_that_made_room_is_a_404(client: Client, problem: Callable[..., Any]) -> None:
    problem(client.get("/page/rollouts/7"), 404, "not_found", "number")


def test_events_are_frames_until_the_server_stops(client: Client) -> None:
    """The stop is known to whoever serves; here the test says it."""
    service = client.app.state["service"]
    service.stopping.set()
    response = client.get("/page/events")
    assert response.headers["content-type"].startswith("text/event-stream")
    event, rest = response.text.split("\n\n", 1)
    assert rest == "" and json.loads(event.removeprefix("data: "))["fields"][0] == "time"


def test_a_dead_engine_is_shown_dead(client: Client, engine: FakeEngine) -> None:
    engine.state = "dead"
    said = frame(client)
    assert said["state"] == "dead" and said["fault"] and said["rows"]["count"] == 0


def test_a_server_of_one_engine_shows_no_replicas(client: Client) -> None:
    assert frame(client)["replicas"] == [] and frame(client)["min_replicas"] == 0


def test_head_of_an_endless_stream_ends(client: Client) -> None:
    response = client.head("/page/events")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")


def test_the_page_is_no_part_of_the_api_s_document(client: Client) -> None:
    paths = client.get("/schema/openapi.json").json()["paths"]
    assert "/v1/rollouts" in paths and not [path for path in paths if path == "/" or path.startswith("/page")]


def test_every_model_has_frames_and_rollouts_of_its_own(client: Client, problem: Callable[..., Any]) -> None:
    assert (frame(client)["model"], frame(client)["models"]) == ("base", ["base"])
    assert client.get("/page/state", params={"model": "base"}).json()["model"] == "base"
    path = str(model_directory())
    residents = residents_for(ServerConfig(model=path, also=(("judge", path), ("draft", path))), None)
    for rollouts, model in enumerate(residents.every):
        for _ in range(rollouts):
            model.observer.finished("a", rollout((1, 0, 3)))
    told = [asyncio.run(Frames(model).opening()) for model in residents.every]
    assert [len(said["rollouts"]) for said in told] == [0, 1, 2]
    names = ["base", "judge", "draft"]
    assert [json.loads(bytes(said["model"])) for said in told] == names
    assert [json.loads(bytes(said["models"])) for said in told] == [names] * 3
    for route in ("/page/state", "/page/events", "/page/rollouts/1"):
        problem(client.get(route, params={"model": MARKUP}), 404, "unknown_policy", "model")
        problem(client.get(route, params={"models": "judge"}), 400, "invalid_field", "models")
