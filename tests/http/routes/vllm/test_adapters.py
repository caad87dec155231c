"""vLLM's routes that load and unload adapters, and what they may read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from litestar.testing import TestClient

from rollout_server.config import ServerConfig
from tests.support.http.fake_engine import FakeEngine
from tests.support.http.fixtures import PEFT_CONFIG, MakeApp

Client = TestClient[Any]
Problem = Callable[..., dict[str, Any]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "shared").mkdir()
    return tmp_path / "shared"


@pytest.fixture
def doors(engine: FakeEngine, folder: Path, made_app: MakeApp) -> Iterator[Client]:
    config = ServerConfig(adapter_dir=folder, max_upload=100_000)
    with TestClient(made_app(config, engine)) as client:
        yield client


@pytest.fixture
def saved(adapter: Callable[..., bytes]) -> Callable[..., Path]:
    def save(directory: Path, seed: int = 0) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "adapter_model.safetensors").write_bytes(adapter(seed))
        (directory / "adapter_config.json").write_text(json.dumps(PEFT_CONFIG))
        return directory

    return save


def load(client: Client, name: str = "policy", path: object = "step-1", **more: Any) -> Any:
    return client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path), **more})


def unload(client: Client, name: str = "policy", **more: Any) -> Any:
    return client.post("/v1/unload_lora_adapter", json={"lora_name": name, **more})


def test_what_is_loaded_is_a_version_like_any(
    doors: Client, folder: Path, saved: Callable[..., Path], problem: Problem
) -> None:
    first = load(doors, path=saved(folder / "runs" / "step-1"))
    assert first.status_code == 200
    assert first.text == "Success: LoRA adapter 'policy' added successfully."
    saved(folder / "runs" / "step-2", seed=1)
    again = problem(load(doors, path="runs/step-2"), 400, "invalid_field", "lora_name")
    assert again["message"] == (
        "The lora adapter 'policy' has already been loaded. If you want to load the adapter in place, set "
        "'load_inplace' to True."
    )
    assert load(doors, path="runs/step-2", load_inplace=True).status_code == 200
    policy = doors.get("/v1/weights/policy").json()
    assert [entry["version"] for entry in policy["versions"]] == [1, 2] and policy["live"] == 2
    assert [entry["mode"] for entry in policy["versions"]] == ["adapter", "adapter"]
    # the same weights once more are no new version
    assert load(doors, path="runs/step-2", load_inplace=True, is_3d_lora_weight=False).status_code == 200
    assert doors.get("/v1/weights/policy").json()["live"] == 2

    gone = unload(doors, lora_int_id=7)
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'policy' removed successfully.")
    problem(unload(doors), 404, "not_found", "lora_name")
    assert load(doors, path="runs/step-2").status_code == 200
    assert doors.get("/v1/weights/policy").json()["live"] == 3


def test_nothing_outside_is_read(
    doors: Client, folder: Path, tmp_path: Path, saved: Callable[..., Path], problem: Problem
) -> None:
    outside = saved(tmp_path / "outside")
    (folder / "link").symlink_to(outside)
    (folder / "loop").symlink_to(folder / "loop")
    saved(folder / "inside")
    (folder / "inside-link").symlink_to(folder / "inside")
    for part in ("adapter_model.safetensors", "adapter_config.json"):
        (saved(folder / f"linked-{part}") / part).unlink()
        (folder / f"linked-{part}" / part).symlink_to(outside / part)
    said = set()
    for path in (
        outside,
        "../outside",
        "inside/../../outside",
        "link",
        "linked-adapter_model.safetensors",
        "linked-adapter_config.json",
        "/etc",
        f"{folder}-evil",
        tmp_path / "nothing there",
    ):
        error = problem(load(doors, path=path), 400, "invalid_field", "lora_path")
        assert "leads out of --adapter-dir" in error["message"]
        said.add(error["message"].replace(repr(str(path)), "PATH"))
    assert not doors.get("/v1/weights").json()["policies"]
    for path in ("loop", "nul\0", "x" * 3000):
        assert load(doors, path=path).status_code in (400, 404)
    assert load(doors, path="inside-link").status_code == 200


def test_what_cannot_be_loaded_changes_nothing(
    doors: Client, folder: Path, saved: Callable[..., Path], problem: Problem
) -> None:
    problem(load(doors, path="nowhere"), 404, "not_found", "lora_path")
    (folder / "empty").mkdir()
    problem(load(doors, path="empty"), 422, "adapter_invalid", "lora_path")
    broken = saved(folder / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"nothing")
    problem(load(doors, path="broken"), 422, "adapter_invalid")
    (broken / "adapter_model.safetensors").write_bytes(b"\0" * 100_001)
    problem(load(doors, path="broken"), 413, "body_too_large", "lora_path")
    saved(folder / "good")
    for name in ("base", "a b", "org/tiny"):
        problem(load(doors, name=name, path="good"), 400, "invalid_field", "lora_name")
    problem(load(doors, path=""), 400, "invalid_field", "lora_path")
    problem(load(doors, path="good", is_3d_lora_weight=True), 400, "unsupported_field", "is_3d_lora_weight")
    problem(load(doors, path="good", base_model_name="x"), 400, "invalid_field", "base_model_name")
    problem(unload(doors, name="base"), 404, "not_found", "lora_name")
    for route in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        problem(doors.post(route, content=b"{", headers={"content-type": "application/json"}), 400, "bad_body")
        problem(doors.post(route, json={}), 400, "invalid_field", "lora_name")
        problem(doors.post(route, json={"lora_name": 5, "lora_path": "good"}), 400, "invalid_field", "lora_name")
    assert not doors.get("/v1/weights").json()["policies"]


def test_without_the_option_there_are_no_such_doors(client: Client, problem: Problem) -> None:
    for response in (load(client), unload(client)):
        assert "--adapter-dir" in problem(response, 404, "not_found")["message"]


def test_the_option_names_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no directory"):
        ServerConfig(adapter_dir=tmp_path / "nothing")


def test_the_prefix_cache_is_reset_as_vllm_does(client: Client, problem: Problem) -> None:
    for query in ("", "?reset_running_requests=false", "?reset_external=true&reset_running_requests=0"):
        assert client.post(f"/reset_prefix_cache{query}").status_code == 200
    path = "/reset_prefix_cache?"
    error = problem(client.post(f"{path}reset_running_requests=true"), 400, "unsupported_field")
    assert error["param"] == "reset_running_requests"
    problem(client.post(f"{path}reset_external=maybe"), 400, "invalid_field", "reset_external")
    problem(client.post(f"{path}mode=hard"), 400, "invalid_field", "mode")
