"""`/v1/models`, `/health`, `/ready`, `/schema`, and the life of the engine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from litestar.testing import TestClient

from rollout_server.config import ServerConfig
from rollout_server.schemas.system import HealthReply, ModelsReply, ReadyReply
from tests.support.http.fake_engine import CONTEXT, FakeEngine
from tests.support.http.fake_versions import BASE_DIGEST
from tests.support.http.fixtures import PEFT_CONFIG
from tests.support.http.shared_routes import make_app

Client = TestClient[Any]


def test_models_are_the_base_names_and_versions(client: Client, engine: FakeEngine) -> None:
    engine.add("policy", 2)
    body = client.get("/v1/models").json()
    ModelsReply.model_validate(body)
    assert [card["id"] for card in body["data"]] == ["base", "org/tiny", "policy", "policy@1", "policy@2"]
    assert body["data"][0]["digest"] == BASE_DIGEST
    assert body["data"][2]["digest"] == body["data"][4]["digest"]
    assert body["data"][0]["max_model_len"] == CONTEXT
    assert body["data"][0]["eos_token_ids"] == [engine.tokenizer.eos_token_id]
    assert body["data"][0]["kv_bits"] is None


def test_one_model_by_its_name(client: Client, engine: FakeEngine, problem: Callable[..., Any]) -> None:
    engine.add("policy", 2)
    for card in client.get("/v1/models").json()["data"]:
        assert client.get(f"/v1/models/{card['id']}").json() == card
    assert client.get("/v1/models/org%2Ftiny").json()["id"] == "org/tiny"
    for name in ("nobody", "policy@3", "org"):
        problem(client.get(f"/v1/models/{name}"), 404, "unknown_policy", "model")


def test_health_follows_the_engine(client: Client, engine: FakeEngine, problem: Callable[..., Any]) -> None:
    body = client.get("/health").json()
    HealthReply.model_validate(body)
    assert (body["waiting"], body["running"], body["steps"], body["tokens"]) == (0, 2, 3, 4)
    engine.answers = False
    problem(client.get("/health"), 503, "engine_unavailable")
    engine.answers = True
    engine.state = "dead"
    error = problem(client.get("/health"), 503, "engine_unavailable")
    assert "The engine ended: a test." in error["message"]
    problem(client.get("/ready"), 503, "engine_unavailable")


def test_while_the_model_loads_every_route_says_so(
    client: Client, engine: FakeEngine, push: Callable[..., Any], problem: Callable[..., Any]
) -> None:
    engine.state = "starting"
    for path in ("/v1/models", "/v1/weights", "/health", "/ready"):
        assert problem(client.get(path), 503, "engine_unavailable")["retryable"] is True
    problem(client.post("/v1/completions", json={"model": "base", "prompt": "x"}), 503, "engine_unavailable")
    problem(push(), 503, "engine_unavailable")


def test_the_lifespan_starts_and_closes_the_engine(engine: FakeEngine) -> None:
    with TestClient(make_app(ServerConfig(), engine)) as client:  # type: ignore[arg-type]
        assert engine.life == ["started"]
        ReadyReply.model_validate(client.get("/ready").json())
    assert engine.life == ["started", "closed"]


def test_every_start_is_an_instance_of_its_own(engine: FakeEngine, tokenizer: Any) -> None:
    seen = set()
    for _ in range(2):
        with TestClient(make_app(ServerConfig(), FakeEngine(tokenizer))) as client:  # type: ignore[arg-type]
            seen.add(client.get("/ready").json()["instance"])
    assert len(seen) == 2


@pytest.fixture
def directory(tmp_path: Path, adapter: Callable[..., bytes]) -> Path:
    (tmp_path / "adapter_model.safetensors").write_bytes(adapter())
    (tmp_path / "adapter_config.json").write_text(json.dumps(PEFT_CONFIG))
    return tmp_path


def settled(client: Client) -> Any:
    """What /ready answers once the adapters were loaded, or could not be."""
    while "still being loaded" in (response := client.get("/ready")).text:
        pass
    return response


def test_configured_adapters_are_published_before_ready(engine: FakeEngine, directory: Path) -> None:
    config = ServerConfig(adapters=(("policy", directory),))
    with TestClient(make_app(config, engine)) as client:  # type: ignore[arg-type]
        assert settled(client).status_code == 200
        assert client.get("/v1/weights/policy").json()["live"] == 1


def test_an_adapter_that_does_not_fit_keeps_the_server_from_being_ready(
    engine: FakeEngine, directory: Path, problem: Callable[..., Any]
) -> None:
    (directory / "adapter_model.safetensors").write_bytes(b"nothing")
    config = ServerConfig(adapters=(("policy", directory),))
    with TestClient(make_app(config, engine)) as client:  # type: ignore[arg-type]
        error = problem(settled(client), 503, "engine_unavailable")
        assert "safetensors" in error["message"]
        assert client.get("/health").status_code == 200


PATHS = {
    "/v1/rollouts",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/embeddings",
    *(f"{prefix}/classify" for prefix in ("", "/v1")),
    *(f"{prefix}/score" for prefix in ("", "/v1")),
    *(f"{prefix}/rerank" for prefix in ("", "/v1", "/v2")),
    "/pooling",
    "/get_reward",
    "/v1/rewards",
    "/v1/logprobs",
    "/v1/replay",
    "/v1/probe",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/v1/abort",
    "/v1/release",
    "/reset_prefix_cache",
    "/v1/pause",
    "/v1/resume",
    "/pause",
    "/resume",
    "/is_paused",
    "/tokenize",
    "/detokenize",
    "/tokenizer_info",
    "/v1/weights",
    "/v1/weights/{name}",
    "/v1/weights/{name}/activate",
    "/v1/weights/{name}/{version}",
    "/v1/weights/{name}/{version}/export",
    "/v1/fleet",
    "/v1/fleet/{id}",
    "/v1/fleet/{id}/drain",
    "/v1/fleet/{id}/restart",
    "/v1/models",
    "/v1/models/{model}",
    "/health",
    "/ready",
    "/metrics",
}
"""Of every route, the page's aside."""


def test_the_schema_is_served_offline_and_knows_every_route(client: Client) -> None:
    for path in ("/schema", "/schema/openapi.json"):
        schema = client.get(path).json()
        assert schema["openapi"].startswith("3.1")
    assert set(schema["paths"]) == PATHS
    body = schema["paths"]["/v1/rollouts"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    properties = schema["components"]["schemas"][body["$ref"].rsplit("/", 1)[-1]]["properties"]
    assert {"policy", "prompts", "n", "sampling", "return", "stream"} <= set(properties)
    push = schema["paths"]["/v1/weights"]["post"]
    assert set(push["requestBody"]["content"]) == {"multipart/form-data", "application/octet-stream"}
    for methods in schema["paths"].values():
        for operation in methods.values():
            assert {"400", "401", "404", "409", "413", "422", "429", "503"} <= set(operation["responses"])


def test_the_schema_says_what_is_refused_and_what_is_streamed(client: Client) -> None:
    schema = client.get("/schema/openapi.json").json()
    models = schema["components"]["schemas"]
    for name in ("CompletionsRequest", "ChatRequest", "RolloutsRequest", "Prompt", "Message", "StreamOptions"):
        assert models[name]["additionalProperties"] is False, name
    assert models["AbortRequest"]["properties"]["ids"]["items"]["minLength"] == 1
    for path, media_type in (
        ("/v1/completions", "text/event-stream"),
        ("/v1/chat/completions", "text/event-stream"),
        ("/v1/rollouts", "application/x-ndjson"),
    ):
        content = schema["paths"][path]["post"]["responses"]["200"]["content"]
        assert set(content) == {"application/json", media_type}
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(schema)))
    assert references <= set(models)


def test_options_name_every_method(client: Client) -> None:
    for path, methods in (("/v1/weights", "GET, HEAD, OPTIONS, POST"), ("/v1/abort", "OPTIONS, POST")):
        response = client.options(path)
        assert (response.status_code, response.headers["allow"]) == (204, methods)


def test_routes_that_do_not_exist(client: Client, problem: Callable[..., Any]) -> None:
    problem(client.get("/v1/nothing"), 404, "not_found")
    response = client.get("/v1/rollouts")
    problem(response, 405, "method_not_allowed")
    assert "POST" in response.headers["allow"]
