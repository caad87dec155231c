"""`/v1/weights`: both encodings, options, aliases."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import pytest
from litestar.testing import TestClient

from adapters.formats.read import read_bundle
from rollout_server.errors import WeightsMemoryExceeded
from rollout_server.schemas.weights import ActivateReply, OnePolicyReply, PoliciesReply, PushReply
from tests.support.http.fake_engine import LAYERS, FakeEngine
from tests.support.http.fake_versions import BASE_DIGEST
from tests.support.http.fixtures import PEFT_CONFIG

Client = TestClient[Any]
OCTETS = {"content-type": "application/octet-stream"}


def test_a_push_answers_with_what_the_contract_says(
    client: Client, engine: FakeEngine, push: Callable[..., Any], adapter: Callable[..., bytes]
) -> None:
    response = push(label="step-120")
    assert response.status_code == 201
    body = response.json()
    PushReply.model_validate(body)
    bundle = read_bundle(adapter(), PEFT_CONFIG, layers=LAYERS)
    assert (body["name"], body["version"], body["digest"]) == ("policy", 1, bundle.digest)
    assert (body["label"], body["kind"], body["mode"], body["rank"]) == ("step-120", "lora", "adapter", 2)
    assert (body["live"], body["unchanged"], body["bytes"]) == (True, False, bundle.nbytes)
    assert body["base"] == {"id": "org/tiny", "digest": BASE_DIGEST}
    report = body["report"]
    assert (report["modules"], report["zero_modules"], report["bytes"]) == (2, [], bundle.nbytes)
    assert report["delta_norm"] == pytest.approx(bundle.delta_norm) and 1 < report["effective_rank"] <= 2
    norms = {path: measure.norm for path, measure in bundle.measures.items()}
    largest = sorted(norms, key=lambda path: -norms[path])
    assert [module["module"] for module in report["largest_modules"]] == largest
    assert report["largest_modules"][0]["delta_norm"] == pytest.approx(norms[largest[0]])
    assert set(body["timings_ms"]) == {"receive", "validate", "stage", "activate"}
    assert (body["timings_ms"]["stage"], body["timings_ms"]["activate"]) == (1.5, 0.5)
    assert engine.published[-1].bundle.digest == bundle.digest


def test_both_encodings_make_the_same_version(
    client: Client, push: Callable[..., Any], adapter: Callable[..., bytes]
) -> None:
    first = push(config=PEFT_CONFIG).json()
    config = quote(json.dumps(PEFT_CONFIG))
    for url, body in (
        (f"/v1/weights?name=policy&config={config}", adapter()),
        ("/v1/weights?name=policy", adapter(config=True)),
    ):
        response = client.post(url, content=body, headers=OCTETS)
        assert response.status_code == 200, response.text
        again = response.json()
        assert again["unchanged"] is True
        assert (again["version"], again["digest"]) == (1, first["digest"])


def test_a_body_without_a_length_is_read_as_it_comes(client: Client, adapter: Callable[..., bytes]) -> None:
    whole = adapter(config=True)

    def pieces() -> Iterator[bytes]:
        for at in range(0, len(whole), 100):
            yield whole[at : at + 100]

    response = client.post("/v1/weights?name=policy&label=x", content=pieces(), headers=OCTETS)
    assert response.status_code == 201, response.text
    assert response.json()["label"] == "x"


def test_the_mode_is_part_of_what_a_version_is(client: Client, engine: FakeEngine, push: Callable[..., Any]) -> None:
    first, merged = push().json(), push(mode="merged", dequantize="true").json()
    assert (first["mode"], merged["mode"]) == ("adapter", "merged") and first["digest"] == merged["digest"]
    assert (merged["version"], merged["unchanged"]) == (2, False)
    sent = engine.published[-1]
    assert (sent.mode, sent.dequantize) == ("merged", True) and sent.prepared is not None
    assert sent.prepared.dtype == "float32"
    assert push(mode="merged").json()["unchanged"] is True
    assert [v["mode"] for v in client.get("/v1/weights/policy").json()["versions"]] == ["adapter", "merged"]


def test_options_reach_the_engine(client: Client, engine: FakeEngine, push: Callable[..., Any]) -> None:
    push(activate="false", format="peft", headers={"if-match": '"7"'})
    sent = engine.published[-1]
    assert (sent.activate, sent.label, sent.if_match) == (False, None, "7")


def test_if_match_is_a_version_or_a_digest(
    client: Client, engine: FakeEngine, push: Callable[..., Any], problem: Callable[..., Any]
) -> None:
    engine.add("policy", 2)
    at = problem(push(headers={"if-match": '"1"'}), 412, "precondition_failed")
    assert (at["policy"], at["version"], at["digest"]) == ("policy", 2, engine.find("policy", 2).digest)
    for wrong in ("2", 'W/"2"', '"latest"', '"sha256:12"'):
        problem(push(headers={"if-match": wrong}), 400, "invalid_field", "If-Match")
    live = engine.live("policy")
    assert live is not None
    assert push(headers={"if-match": f'"{live.digest[:15]}"'}).status_code == 201


def test_two_answers_to_one_question_are_refused(
    client: Client, adapter: Callable[..., bytes], push: Callable[..., Any], problem: Callable[..., Any]
) -> None:
    problem(push(config={"kind": "full"}, format="peft"), 422, "adapter_invalid", "format")
    octets, body = {"content-type": "application/octet-stream"}, adapter(1, config=True)
    for config, status in ((PEFT_CONFIG | {"lora_alpha": 99}, 422), (PEFT_CONFIG, 201)):
        query = {"name": "p", "config": json.dumps(config)}
        response = client.post("/v1/weights", params=query, content=body, headers=octets)
        assert response.status_code == status, response.text
        assert status == 201 or "differs from the one in the weights file" in response.text


def test_only_a_bare_name_can_be_followed(client: Client, engine: FakeEngine, problem: Callable[..., Any]) -> None:
    engine.add("policy")
    body = {"prompts": [{"token_ids": [1]}], "sampling": {"max_tokens": 1}, "on_update": "switch"}
    for address in ("base", "policy@1"):
        problem(client.post("/v1/rollouts", json=body | {"policy": address}), 400, "invalid_field", "on_update")
    assert client.post("/v1/rollouts", json=body | {"policy": "policy"}).status_code == 200


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"mode": "both"}, "invalid_field", "mode"),
        ({"dequantize": "yes"}, "invalid_field", "dequantize"),
        ({"dequantize": "true"}, "invalid_field", "dequantize"),
        ({"config": PEFT_CONFIG | {"kind": "delta"}}, "unsupported_field", "config.peft_type"),
        ({"config": {"kind": "full", "fine_tune_type": "lora"}}, "unsupported_field", "config.fine_tune_type"),
        ({"config": {"kind": "delta", "fine_tune_type": "full"}}, "unsupported_field", "config.kind"),
        ({"config": {"fine_tune_type": "full", "peft_type": "LORA"}}, "unsupported_field", "config.peft_type"),
        ({"config": {"kind": "soup"}}, "unsupported_field", "config.kind"),
        ({"config": PEFT_CONFIG | {"lora_bias": True}}, "unsupported_field", "config.lora_bias"),
        ({"format": "gguf"}, "invalid_field", "format"),
        ({"activate": "yes"}, "invalid_field", "activate"),
        ({"label": "x" * 65}, "invalid_field", "label"),
        ({"name": "base"}, "invalid_field", "name"),
        ({"name": "org/tiny"}, "invalid_field", "name"),
        ({"name": "a b"}, "invalid_field", "name"),
        ({"name": ""}, "invalid_field", "name"),
        ({"colour": "red"}, "invalid_field", "colour"),
        ({"config": b"{"}, "bad_body", "config"),
        ({"config": b"[]"}, "invalid_field", "config"),
        ({"config": b'{"r": 1, "r": 2}'}, "bad_body", "config"),
        ({"weights": b""}, "bad_body", "weights"),
    ],
)
def test_wrong_fields_are_named(
    engine: FakeEngine,
    push: Callable[..., Any],
    problem: Callable[..., Any],
    fields: dict[str, Any],
    code: str,
    param: str,
) -> None:
    problem(push(**fields), 400, code, param)
    assert not engine.published


def test_the_query_is_as_strict_as_the_form(
    client: Client, adapter: Callable[..., bytes], problem: Callable[..., Any], push: Callable[..., Any]
) -> None:
    def send(query: str) -> Any:
        return client.post(f"/v1/weights?{query}", content=adapter(config=True), headers=OCTETS)

    problem(send("name=policy&colour=red"), 400, "invalid_field", "colour")
    problem(send("name=policy&mode=both"), 400, "invalid_field", "mode")
    problem(send("name=policy&name=other"), 400, "invalid_field", "name")
    problem(send(""), 400, "invalid_field", "name")
    problem(send("name=policy&config=%7B"), 400, "bad_body", "config")
    files = {"weights": ("w", adapter(config=True))}
    problem(client.post("/v1/weights?name=policy", files=files), 400, "invalid_field", "name")


def test_broken_forms_are_refused(
    client: Client, engine: FakeEngine, adapter: Callable[..., bytes], problem: Callable[..., Any]
) -> None:
    form = "multipart/form-data; boundary=xyz"
    part = b'--xyz\r\nContent-Disposition: form-data; name="weights"; filename="w"\r\n\r\n' + adapter(config=True)
    name = b'--xyz\r\nContent-Disposition: form-data; name="name"\r\n\r\npolicy\r\n'

    def send(body: bytes, content_type: str = form) -> Any:
        return client.post("/v1/weights", content=body, headers={"content-type": content_type})

    assert send(name + part + b"\r\n--xyz--\r\n").status_code == 201
    problem(send(name + part[:-40]), 400, "bad_body")
    problem(send(b"no form at all"), 400, "bad_body")
    problem(send(b""), 400, "bad_body")
    problem(send(name + part, "multipart/form-data"), 400, "bad_body", "Content-Type")
    problem(send(name + name + part + b"\r\n--xyz--\r\n"), 400, "invalid_field", "name")
    problem(send(name + b"--xyz--\r\n"), 400, "invalid_field", "weights")
    huge_label = b'--xyz\r\nContent-Disposition: form-data; name="label"\r\n\r\n' + b"x" * 5000 + b"\r\n"
    problem(send(name + huge_label + b"--xyz--\r\n"), 413, "body_too_large", "label")
    problem(send(b"x", "text/plain"), 415, "unsupported_media_type")
    problem(client.post("/v1/weights"), 415, "unsupported_media_type")
    assert len(engine.published) == 1


def test_policies_and_versions_are_listed(client: Client, engine: FakeEngine, problem: Callable[..., Any]) -> None:
    assert client.get("/v1/weights").json()["policies"] == []
    engine.add("policy", 2)
    engine.add("other", 1)
    body = client.get("/v1/weights").json()
    PoliciesReply.model_validate(body)
    assert [policy["name"] for policy in body["policies"]] == ["other", "policy"]
    one = client.get("/v1/weights/policy").json()
    OnePolicyReply.model_validate(one)
    assert one["live"] == 2
    assert [(version["version"], version["live"]) for version in one["versions"]] == [(1, False), (2, True)]
    assert one["versions"][0]["label"] == "step-1"
    assert one["instance"] == body["instance"]
    error = problem(client.get("/v1/weights/nobody"), 404, "unknown_policy", "name")
    assert "other, policy" in error["message"]


def test_an_alias_moves(client: Client, engine: FakeEngine, problem: Callable[..., Any]) -> None:
    engine.add("policy", 3)

    def activate(version: Any, name: str = "policy", **headers: str) -> Any:
        return client.post(f"/v1/weights/{name}/activate", json={"version": version}, headers=headers)

    response = activate(1)
    body = response.json()
    assert response.status_code == 200
    ActivateReply.model_validate(body)
    assert body["live"] is True and body["unchanged"] is False
    assert activate(1).json()["unchanged"] is True
    problem(activate(2, **{"if-match": '"3"'}), 412, "precondition_failed")
    problem(activate(9), 404, "unknown_policy")
    problem(activate(1, name="nobody"), 404, "unknown_policy")
    engine.free("policy", 2)
    problem(activate(2), 409, "version_gone")
    for wrong in ("2", True, 0, -1, 1.5, None):
        problem(activate(wrong), 400, "invalid_field", "version")


def test_no_room_for_weights_is_507(
    engine: FakeEngine, push: Callable[..., Any], problem: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(publish: Any) -> Any:
        raise WeightsMemoryExceeded("Another version needs 5 bytes; 4 are free.")

    monkeypatch.setattr(engine, "publish", full)
    problem(push(), 507, "weights_memory_exceeded")
