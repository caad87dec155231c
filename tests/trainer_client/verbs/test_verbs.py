from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import deserialize
from safetensors.numpy import save_file

from rollout_server.schemas.logprobs import LogprobsRequest
from rollout_server.schemas.rollouts import RolloutsRequest
from rollout_server.schemas.weights import WeightsOptions
from tests.trainer_client import contract
from trainer_client import AsyncRolloutClient, RolloutClient
from trainer_client.verbs import control, publishing, sampling, scoring
from trainer_client.wire import call
from trainer_client.wire.parsing import parse_published, parse_reply

TENSORS = {"q.lora_A.weight": np.ones((2, 3), "f4"), "q.lora_B.weight": np.zeros((4, 2), "f4")}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
VERSION = parse_published(contract.reply(contract.published()), None)


def body(call: call.Call[Any]) -> dict[str, Any]:
    return json.loads(bytes(call.body))


# ---- rollouts -----------------------------------------------------------------------------------------------------


def test_every_kind_of_prompt_becomes_a_prompt_object() -> None:
    messages = [{"role": "user", "content": "hi"}]
    prompts = [
        "2+2=",
        [1, 2],
        np.array([3, 4]),
        (np.int64(5),),
        messages,
        {"token_ids": np.array([6]), "id": "x", "n": 2},
    ]
    sent = body(sampling.rollouts(prompts, policy="policy"))
    assert sent["prompts"] == [
        {"text": "2+2="},
        {"token_ids": [1, 2]},
        {"token_ids": [3, 4]},
        {"token_ids": [5]},
        {"messages": messages},
        {"token_ids": [6], "id": "x", "n": 2},
    ]
    RolloutsRequest.model_validate_json(bytes(sampling.rollouts(prompts).body))


def test_request_and_sampling_fields_go_where_the_contract_has_them() -> None:
    call = sampling.rollouts(
        ["a"], policy="policy@7", n=8, max_tokens=256, temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, min_tokens=1,
        seed=7, stop="x", stop_token_ids=[3], ignore_eos=True, min_version=7, timeout_s=5.0, id="mine-1",
        on_update="finish", returns=["entropy"], top_logprobs=3,
    )  # fmt: skip
    assert body(call) == {
        "policy": "policy@7",
        "prompts": [{"text": "a"}],
        "return": ["entropy"],
        "sampling": {
            "max_tokens": 256, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "min_tokens": 1, "seed": 7,
            "stop": ["x"], "stop_token_ids": [3], "ignore_eos": True,
        },
        "n": 8, "min_version": 7, "timeout_s": 5.0, "id": "mine-1", "on_update": "finish", "top_logprobs": 3,
    }  # fmt: skip
    assert RolloutsRequest.model_validate_json(bytes(call.body)).sampling.top_k == 5
    assert (call.method, call.path, call.idempotent, call.timeout_s) == ("POST", "/v1/rollouts", False, 65.0)


def test_what_is_not_given_is_not_sent() -> None:
    assert body(sampling.rollouts([[1]])) == {
        "policy": "base", "prompts": [{"token_ids": [1]}], "return": ["text", "sampling_logprobs"], "sampling": {}
    }  # fmt: skip
    assert body(sampling.stream_rollouts([[1]])) == body(sampling.rollouts([[1]])) | {"stream": True}
    assert sampling.rollouts([[1]]).timeout_s is None


def test_a_name_the_client_does_not_know_reaches_the_server_to_be_refused() -> None:
    assert body(sampling.rollouts([[1]], max_tokns=3))["sampling"] == {"max_tokns": 3}  # type: ignore[call-arg]


@pytest.mark.parametrize("prompts", ["text", b"text", {"text": "a"}, [1, 2], [None]])
def test_what_is_no_list_of_prompts_is_refused_here(prompts: Any) -> None:
    with pytest.raises(TypeError, match="prompt"):
        sampling.rollouts(prompts)


def test_a_pushed_version_pins_exactly_that_one() -> None:
    assert body(sampling.rollouts([[1]], policy=VERSION))["policy"] == f"policy@{contract.DIGEST}"


# ---- weights ------------------------------------------------------------------------------------------------------


def test_a_push_is_safetensors_with_options_in_the_query() -> None:
    call = publishing.push("policy", TENSORS, CONFIG, activate=False, label="step-1", if_match=6)
    assert (call.path, call.idempotent) == ("/v1/weights", True)
    assert call.query == {"name": "policy", "activate": "false", "label": "step-1"}
    assert WeightsOptions.model_validate(call.query).label == "step-1"
    assert call.headers == {"content-type": "application/octet-stream", "if-match": '"6"'}
    assert {name for name, _ in deserialize(bytes(call.body))} == TENSORS.keys()
    assert publishing.push("policy", TENSORS, CONFIG).query == {"name": "policy", "activate": "true"}
    merged = publishing.push("policy", TENSORS, CONFIG, mode="merged", dequantize=True)
    assert merged.query == {"name": "policy", "activate": "true", "mode": "merged", "dequantize": "true"}
    assert publishing.push("policy", TENSORS, CONFIG, if_match=VERSION).headers["if-match"] == f'"{contract.DIGEST}"'


def test_a_directory_is_pushed_as_the_same_tensors(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="config is missing"):
        publishing.push("policy", tmp_path)
    assert bytes(publishing.push("policy", tmp_path, CONFIG).body) == bytes(
        publishing.push("policy", TENSORS, CONFIG).body
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    assert bytes(publishing.push("policy", str(tmp_path)).body) == bytes(
        publishing.push("policy", TENSORS, CONFIG).body
    )
    with pytest.raises(ValueError, match="brings its own config"):
        publishing.push("policy", tmp_path, CONFIG)


def test_tensors_without_a_config_and_what_is_no_adapter_are_refused() -> None:
    with pytest.raises(ValueError, match="config is missing"):
        publishing.push("policy", TENSORS)
    with pytest.raises(TypeError, match="not list"):
        publishing.push("policy", [1], CONFIG)


def test_activate_is_only_repeatable_without_a_condition() -> None:
    call = publishing.activate("a.b", 6)
    assert (call.path, body(call), call.idempotent) == ("/v1/weights/a.b/activate", {"version": 6}, True)
    conditional = publishing.activate("a-b", 6, if_match="sha256:12345678")
    assert (conditional.path, conditional.idempotent) == ("/v1/weights/a-b/activate", False)
    assert conditional.headers["if-match"] == '"sha256:12345678"'


# ---- the rest -----------------------------------------------------------------------------------------------------


def test_sequences_to_score_are_ids_objects_or_a_batch() -> None:
    call = scoring.logprobs([[1, 2], np.array([3]), {"token_ids": np.array([4, 5]), "start": 1}], temperature=0.5)
    assert body(call)["sequences"] == [{"token_ids": [1, 2]}, {"token_ids": [3]}, {"token_ids": [4, 5], "start": 1}]
    assert (body(call)["temperature"], body(call)["return"], call.idempotent) == (0.5, [], True)
    LogprobsRequest.model_validate_json(bytes(call.body))
    batch = parse_reply(contract.reply(contract.rollouts(contract.row())))
    scored = scoring.logprobs(batch, policy=VERSION, returns=["entropy"], top_logprobs=2)
    assert body(scored)["sequences"] == [{"token_ids": [1, 3, 5, 6, 2], "start": 2}]
    assert LogprobsRequest.model_validate_json(bytes(scored.body)).top_logprobs == 2


def test_sequences_may_be_read_under_the_spans_of_their_rows() -> None:
    spans = [contract.span(7, 0, 2), {**contract.span(8, 2, 3), "kv": "carried"}]
    batch = parse_reply(contract.reply(contract.rollouts(contract.row(versions=spans), contract.row(0, 1))))
    call = scoring.logprobs(batch, policy="policy", versions=[batch.spans[0], None])
    first, second = body(call)["sequences"]
    assert first["versions"] == [{k: v for k, v in span.items() if v is not None} for span in spans]
    assert "versions" not in second
    assert len(LogprobsRequest.model_validate_json(bytes(call.body)).sequences[0].versions or []) == 2
    given = scoring.logprobs([[1, 2]], versions=[[{"policy": "p", "version": 1, "start": 0, "end": 2}]])
    assert body(given)["sequences"][0]["versions"][0]["policy"] == "p"
    with pytest.raises(ValueError, match="2 sequences"):
        scoring.logprobs([[1], [2]], versions=[None])


def test_completions_pass_their_fields_through() -> None:
    call = sampling.completions(np.array([[1, 2]]), model="policy", max_tokens=4, logprobs=1)
    assert body(call) == {"model": "policy", "prompt": [[1, 2]], "max_tokens": 4, "logprobs": 1}
    with pytest.raises(ValueError, match="stream"):
        sampling.completions("a", stream=True)


def test_both_clients_have_every_verb_with_its_parameters_and_documentation() -> None:
    verbs = {
        name: function
        for module in (control, publishing, sampling, scoring)
        for name, function in vars(module).items()
        if inspect.isfunction(function) and function.__module__ == module.__name__ and hasattr(RolloutClient, name)
    }
    assert len(verbs) == 19
    for client in (RolloutClient, AsyncRolloutClient):
        for name, build in verbs.items():
            method = getattr(client, name)
            assert method.__doc__ == build.__doc__
            own, *parameters = inspect.signature(method).parameters.values()
            assert own.name == "self"
            assert parameters == list(inspect.signature(build).parameters.values())


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "localhost", "ftp://x"])
def test_an_address_without_a_scheme_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="http://"):
        RolloutClient(url)
