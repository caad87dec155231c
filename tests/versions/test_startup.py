"""`--state-dir` over HTTP: an application that is started again serves what the one before acknowledged."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from litestar.testing import TestClient

from adapters.versions import store as store_module
from adapters.versions.store import StateStore
from rollout_server.config import ServerConfig
from rollout_server.errors import InvalidField, VersionGone, WeightsMemoryExceeded
from tests.support.http.fake_engine import FakeEngine
from tests.support.http.fixtures import PEFT_CONFIG
from tests.support.http.shared_routes import make_app
from tests.support.live_server import until

Client = TestClient[Any]
OCTETS = {"content-type": "application/octet-stream"}
Adapter = Callable[..., bytes]


@contextmanager
def started(directory: Path, engine: FakeEngine, **options: Any) -> Iterator[Client]:
    with TestClient(make_app(ServerConfig(state_dir=directory, **options), engine)) as client:  # type: ignore[arg-type]
        until(lambda: client.get("/ready").status_code == 200)
        yield client


@pytest.fixture
def another(tokenizer: Any) -> Callable[..., FakeEngine]:
    """The engine of the next process."""
    return lambda **options: FakeEngine(tokenizer, **options)


def push(client: Client, body: bytes, query: str = "", name: str = "p", **headers: str) -> Any:
    return client.post(f"/v1/weights?name={name}{query}", content=body, headers=OCTETS | headers)


def listed(client: Client, name: str = "p") -> dict[str, Any]:
    body: dict[str, Any] = client.get(f"/v1/weights/{name}").json()
    return body


def test_a_restart_serves_the_same(tmp_path: Path, another: Callable[..., FakeEngine], adapter: Adapter) -> None:
    with started(tmp_path, another()) as client:
        for seed in range(1, 5):
            assert push(client, adapter(seed, config=True), f"&label=step-{seed}").status_code == 201
        push(client, adapter(9, config=True), "&activate=false")
        push(client, adapter(1, config=True), name="q")
        push(client, adapter(1, config=True), name="r")
        client.delete("/v1/weights/r")
        client.post("/v1/weights/p/activate", json={"version": 2})
        client.patch("/v1/weights/p/1", json={"pinned": True})
        client.delete("/v1/weights/p/3")
        before = listed(client)
        assert (before["live"], [v["version"] for v in before["versions"]]) == (2, [1, 2, 4, 5])
    with started(tmp_path, another()) as client:
        assert listed(client) == before, "alias, versions, numbers, labels, pins, instance"
        assert listed(client, "q")["live"] == 1
        assert client.get("/v1/weights/r").status_code == 404
        exported = client.get("/v1/weights/p/4/export")
        assert exported.headers["x-policy-digest"] == before["versions"][2]["digest"]
        assert push(client, adapter(10, config=True)).json()["version"] == 6
        assert push(client, adapter(10, config=True), name="r").json()["version"] == 2
        for number in (3, 1):
            client.patch("/v1/weights/p/1", json={"pinned": False})
            client.delete(f"/v1/weights/p/{number}")
            gone = client.get(f"/v1/weights/p/{number}/export").json()
            assert gone["error"]["code"] == "version_gone"
    with started(tmp_path, another(keep_versions=2)) as client:
        after = listed(client)
        assert (after["live"], [v["version"] for v in after["versions"]]) == (6, [5, 6])


def test_the_alias_moves_only_after_the_version_is_on_disk(
    tmp_path: Path, another: Callable[..., FakeEngine], adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = another()
    seen: list[tuple[int | None, int | None]] = []
    write = StateStore.write

    def watched(store: StateStore, record: Any) -> None:
        """(alias that is written, alias of the engine meanwhile)"""
        live = engine.snapshot()[0].live
        seen.append((record.live, live.number if live else None))
        write(store, record)

    monkeypatch.setattr(StateStore, "write", watched)
    with started(tmp_path, engine) as client:
        push(client, adapter(1, config=True))
        push(client, adapter(2, config=True))
        client.post("/v1/weights/p/activate", json={"version": 1})
    assert seen == [(1, None), (2, 1), (1, 2)]


def test_a_disk_that_fails_makes_nothing_live(
    tmp_path: Path, another: Callable[..., FakeEngine], adapter: Adapter, problem: Callable[..., Any]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with started(tmp_path, another()) as client:
        push(client, adapter(1, config=True))
        for step in ("put", "write"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(StateStore, step, full)
                error = problem(push(client, adapter(2, config=True)), 507, "storage_failed")
                assert "No space left" in error["message"]
                if step == "write":
                    problem(client.post("/v1/weights/p/activate", json={"version": 1}), 507, "storage_failed")
            assert (listed(client)["live"], len(listed(client)["versions"])) == (1, 1)
        accepted = push(client, adapter(2, config=True)).json()
        assert accepted["live"] and set(accepted["timings_ms"]) > {"persist"}
    with started(tmp_path, another()) as client:
        assert listed(client)["live"] == accepted["version"]


def test_a_first_push_that_was_refused_late_is_not_served_by_a_restart(
    tmp_path: Path, another: Callable[..., FakeEngine], adapter: Adapter, problem: Callable[..., Any]
) -> None:
    """Its record was in place, and only syncing the directory failed."""
    real, failures = store_module._sync_directory, [OSError(5, "Input/output error")]

    def failing(folder: Path) -> None:
        real(folder)
        if folder.name == "policies" and failures:
            raise failures.pop()

    with started(tmp_path, another()) as client:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store_module, "_sync_directory", failing)
            problem(push(client, adapter(1, config=True)), 507, "storage_failed")
        assert client.get("/v1/weights/p").status_code == 404 and not failures
    with started(tmp_path, another()) as client:
        assert client.get("/v1/weights/p").status_code == 404
        assert push(client, adapter(1, config=True)).json()["live"]


def test_a_directory_that_is_away_keeps_every_version_label_and_pin(
    tmp_path: Path, another: Callable[..., FakeEngine], adapter: Adapter, problem: Callable[..., Any]
) -> None:
    """Whatever was asked: once the directory is back it can be asked again, and a restart agrees."""
    away = tmp_path.with_name(tmp_path.name + "-away")
    with started(tmp_path, another(keep_versions=3), keep_versions=3) as client:
        for seed in (1, 2, 3):
            push(client, adapter(seed, config=True), f"&label=step-{seed}")
        before = listed(client)
        (tmp_path / "policies").rename(away)
        for refused in (
            push(client, adapter(4, config=True)),
            push(client, adapter(3, config=True), "&label=other"),
            client.post("/v1/weights/p/activate", json={"version": 1}),
            client.patch("/v1/weights/p/1", json={"pinned": True}),
            client.delete("/v1/weights/p/2"),
            client.delete("/v1/weights/p"),
        ):
            assert "Nothing changed" in problem(refused, 507, "storage_failed")["message"]
            assert listed(client) == before
        away.rename(tmp_path / "policies")
        assert client.delete("/v1/weights/p/2").json()["deleted"] == [2]
        assert push(client, adapter(3, config=True), "&label=other").json()["label"] == "other"
    with started(tmp_path, another()) as client:
        assert [(v["version"], v["label"]) for v in listed(client)["versions"]] == [(1, "step-1"), (3, "other")]
        assert client.delete("/v1/weights/p").status_code == 200
    with started(tmp_path, another()) as client:
        assert client.get("/v1/weights/p").status_code == 404


def test_a_write_that_fails_after_its_rename_is_taken_back(
    tmp_path: Path, another: Callable[..., FakeEngine], adapter: Adapter, problem: Callable[..., Any]
) -> None:
    failing = iter([None, OSError(5, "Input/output error")])  # the file's own sync succeeds, its directory's does not

    def sync(_: int) -> None:
        if error := next(failing, None):
            raise error

    with started(tmp_path, another()) as client:
        push(client, adapter(1, config=True))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store_module, "_sync", sync)
            problem(client.delete("/v1/weights/p"), 507, "storage_failed")
        assert listed(client)["live"] == 1
    with started(tmp_path, another()) as client:
        assert listed(client)["live"] == 1


def test_weights_that_cannot_be_removed_are_a_line_in_the_log(
    tmp_path: Path, another: Callable[..., FakeEngine], adapter: Adapter, caplog: pytest.LogCaptureFixture
) -> None:
    def denied(*_: Any, **__: Any) -> None:
        raise OSError(13, "Permission denied")

    with started(tmp_path, another(keep_versions=1), keep_versions=1) as client:
        push(client, adapter(1, config=True))
        with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
            patch.setattr(Path, "unlink", denied)
            assert push(client, adapter(2, config=True)).status_code == 201
        assert "could not be removed" in caplog.text
        assert [v["version"] for v in listed(client)["versions"]] == [2]
    with started(tmp_path, another()) as client:
        assert listed(client)["live"] == 2
        assert len(list((tmp_path / "bundles").iterdir())) == 1


def test_a_freed_digest_is_still_known_after_a_restart(
    tmp_path: Path, another: Callable[..., FakeEngine], adapter: Adapter
) -> None:
    with started(tmp_path, another()) as client:
        first = push(client, adapter(1, config=True)).json()["digest"]
        push(client, adapter(2, config=True))
        client.delete("/v1/weights/p/1")
        client.delete("/v1/weights/p")
    engine = another()
    with started(tmp_path, engine) as client:
        push(client, adapter(3, config=True))
        with pytest.raises(VersionGone):
            engine.find("p", digest=first)


def test_a_refused_change_leaves_nothing_on_disk(
    tmp_path: Path,
    another: Callable[..., FakeEngine],
    adapter: Adapter,
    problem: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = another()

    def files() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    with started(tmp_path, engine) as client:
        push(client, adapter(1, config=True))
        push(client, adapter(2, config=True))
        before = files()
        problem(push(client, adapter(3, config=True), **{"if-match": '"7"'}), 412, "precondition_failed")
        activate = "/v1/weights/p/activate"
        problem(client.post(activate, json={"version": 1}, headers={"if-match": '"1"'}), 412, "precondition_failed")
        problem(client.post(activate, json={"version": 9}), 404, "unknown_policy")
        problem(client.delete("/v1/weights/p/2"), 409, "conflict")
        push(client, adapter(2, config=True))  # unchanged

        async def no_room(publish: Any) -> Any:
            raise WeightsMemoryExceeded("No room.")

        monkeypatch.setattr(engine, "publish", no_room)
        problem(push(client, adapter(3, config=True)), 507, "weights_memory_exceeded")
        assert files() == before


def test_a_directory_of_another_base_or_another_server_is_refused(
    tmp_path: Path, another: Callable[..., FakeEngine], adapter: Adapter
) -> None:
    with started(tmp_path, another()) as client:
        push(client, adapter(1, config=True))
        with pytest.raises(InvalidField, match="in use by another server"):
            make_app(ServerConfig(state_dir=tmp_path), another())
    state = next(tmp_path.glob("state.json"))
    with StateStore(tmp_path) as store:
        store._bases = set()
        store.adopt("sha256:" + "c" * 64)
    assert state.exists()
    with TestClient(make_app(ServerConfig(state_dir=tmp_path), another())) as client:  # type: ignore[arg-type]
        until(lambda: "made for the base" in client.get("/ready").text)
        assert push(client, adapter(1, config=True)).status_code == 503


def test_a_configured_adapter_does_not_undo_what_was_live(
    tmp_path: Path, another: Callable[..., FakeEngine], adapter: Adapter, caplog: pytest.LogCaptureFixture
) -> None:
    first = tmp_path / "adapter"
    first.mkdir()
    (first / "adapter_model.safetensors").write_bytes(adapter(1))
    (first / "adapter_config.json").write_text(json.dumps(PEFT_CONFIG))
    state = tmp_path / "state"
    for restart in range(2):
        with caplog.at_level(logging.INFO), started(state, another(), adapters=[f"p={first}"]) as client:
            push(client, adapter(2, config=True))
            assert listed(client)["live"] == 2
            assert len(listed(client)["versions"]) == 2, restart
    assert "p was restored, so" in caplog.text


def test_until_it_is_restored_nothing_is_said_of_names(
    tmp_path: Path,
    another: Callable[..., FakeEngine],
    adapter: Adapter,
    problem: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with started(tmp_path, another()) as client:
        push(client, adapter(1, config=True))
    go = threading.Event()
    load = StateStore.load

    def slow(store: StateStore, name: str) -> Any:
        go.wait(30)
        return load(store, name)

    monkeypatch.setattr(StateStore, "load", slow)
    with TestClient(make_app(ServerConfig(state_dir=tmp_path), another())) as client:  # type: ignore[arg-type]
        rollouts = {"policy": "p", "prompts": [{"token_ids": [1]}], "sampling": {"max_tokens": 1}}
        for response in (
            client.get("/ready"),
            client.get("/v1/weights"),
            client.get("/v1/weights/p"),
            client.get("/v1/weights/p/1/export"),
            client.delete("/v1/weights/p/1"),
            client.post("/v1/rollouts", json=rollouts),
            push(client, adapter(2, config=True)),
        ):
            assert problem(response, 503, "engine_unavailable")["retryable"]
        go.set()
        until(lambda: client.get("/ready").status_code == 200)
        assert listed(client)["live"] == 1
