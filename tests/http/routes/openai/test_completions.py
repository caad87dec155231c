"""`POST /v1/completions`: OpenAI's shapes, streamed and whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from litestar.testing import TestClient

from rollout_server.rollout import FinishReason, PolicyAddress, RolloutRequest
from rollout_server.schemas.openai.completions import CompletionsReply
from tests.support.http.fake_engine import CONTEXT, FakeEngine, Row, logprob, sampling_logprob, top_of
from tests.support.http.fake_versions import BASE_DIGEST

Client = TestClient[Any]


def ask(client: Client, prompt: Any = "the cat", **fields: Any) -> Any:
    return client.post("/v1/completions", json={"model": "base", "prompt": prompt, **fields})


def says(engine: FakeEngine, text: str, reason: FinishReason = FinishReason.LENGTH, stop: Any = None) -> list[int]:
    ids = engine.tokenizer.encode(text)
    engine.script = lambda request, sample: Row(ids, reason, stop)
    return list(ids)


def events(response: Any) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]


def joined(chunks: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """The choice that the chunks of a stream add up to."""
    parts = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    whole = dict(parts[-1])
    whole["text"] = "".join(part["text"] for part in parts)
    if whole["logprobs"] is not None:
        whole["logprobs"] = {
            name: [value for part in parts for value in part["logprobs"][name]] for name in whole["logprobs"]
        }
    if "token_ids" in whole:
        whole["token_ids"] = [id for part in parts for id in part["token_ids"]]
        whole["prompt_token_ids"] = parts[0]["prompt_token_ids"]
    return whole


def test_a_reply_has_openai_s_shape(client: Client, engine: FakeEngine) -> None:
    engine.add("policy", 2)
    ids = says(engine, " and the hat")
    response = ask(client, model="policy", max_tokens=8)
    body = response.json()
    CompletionsReply.model_validate(body)
    assert (body["object"], body["model"]) == ("text_completion", "policy")
    (choice,) = body["choices"]
    assert (choice["index"], choice["text"], choice["finish_reason"]) == (0, " and the hat", "length")
    assert choice["logprobs"] is None and "token_ids" not in choice
    live = engine.live("policy")
    assert live is not None
    assert choice["rollout"]["logprobs_mode"] == "raw_logprobs"
    assert [(span["version"], span["end"]) for span in choice["rollout"]["versions"]] == [(2, len(ids))]
    assert (response.headers["x-policy"], response.headers["x-policy-digest"]) == ("policy@2", live.digest)
    prompt = len(engine.tokenizer.encode("the cat"))
    assert body["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": len(ids),
        "total_tokens": prompt + len(ids),
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_the_four_forms_of_a_prompt(client: Client, engine: FakeEngine) -> None:
    encode = engine.tokenizer.encode
    forms: list[tuple[Any, list[list[int]]]] = [
        ("the cat", [encode("the cat")]),
        (["the cat", "hat"], [encode("the cat"), encode("hat")]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ]
    for prompt, expected in forms:
        body = ask(client, prompt, n=2, return_token_ids=True).json()
        assert [list(group.prompt_ids) for group in engine.submitted[-1][1]] == expected
        assert [choice["index"] for choice in body["choices"]] == list(range(2 * len(expected)))
        assert [choice["prompt_token_ids"] for choice in body["choices"]] == [ids for ids in expected for _ in range(2)]
        assert body["usage"]["prompt_tokens"] == sum(map(len, expected))


def test_parameters_reach_the_engine(client: Client, engine: FakeEngine) -> None:
    given = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "min_tokens": 2, "max_tokens": 9}
    given |= {"presence_penalty": 0.5, "frequency_penalty": -1, "repetition_penalty": 1.25}
    bias = {"7": 2.5, "5": -100}
    ask(client, **given, ignore_eos=True, stop=["x", "y"], stop_token_ids=[3], seed=11, n=2, logit_bias=bias)
    (group,) = engine.submitted[-1][1]
    assert {name: getattr(group.sampling, name) for name in given} == given
    assert (group.sampling.stop, group.sampling.stop_token_ids, group.sampling.ignore_eos) == (("x", "y"), (3,), True)
    assert group.seeds[0] == 11 and group.n == 2
    assert group.sampling.logit_bias == ((5, -100.0), (7, 2.5))
    ask(client, stop="z")
    (group,) = engine.submitted[-1][1]
    assert group.sampling.stop == ("z",)


@pytest.mark.parametrize("fields", [{}, {"max_tokens": None}, {"echo": True}, {"echo": True, "logprobs": 1}], ids=str)
def test_without_max_tokens_there_are_16_or_what_fits(client: Client, engine: FakeEngine, fields: Any) -> None:
    """As OpenAI and vLLM have it; chat and rollouts go on as far as the context does."""
    for prompt, limit in (([5], 16), ([5] * (CONTEXT - 16), 16), ([5] * (CONTEXT - 3), 3)):
        assert ask(client, prompt, **fields).status_code == 200
        assert engine.submitted[-1][1][0].sampling.max_tokens == limit
    messages = [{"role": "user", "content": "the cat"}]
    client.post("/v1/chat/completions", json={"model": "base", "messages": messages})
    client.post("/v1/rollouts", json={"policy": "base", "prompts": [{"token_ids": [5]}]})
    for _, (group,), _ in engine.submitted[-2:]:
        assert group.sampling.max_tokens == CONTEXT - len(group.prompt_ids)


def test_what_was_asked_for_is_not_cut(client: Client, problem: Callable[..., Any]) -> None:
    problem(ask(client, [5] * (CONTEXT - 3), max_tokens=16), 400, "context_length_exceeded", "max_tokens")
    error = problem(ask(client, min_tokens=17), 400, "invalid_field", "min_tokens")
    assert error["message"] == "min_tokens must be between 0 and max_tokens (16), not 17."
    described = client.get("/schema/openapi.json").json()["components"]["schemas"]["CompletionsRequest"]
    assert described["properties"]["max_tokens"]["default"] == 16


def test_logprobs_are_four_arrays_of_one_length(client: Client, engine: FakeEngine) -> None:
    ids = says(engine, " and the hat")
    (choice,) = ask(client, logprobs=2).json()["choices"]
    report = choice["logprobs"]
    assert report["token_logprobs"] == [logprob(id) for id in ids]
    assert "".join(report["tokens"]) == choice["text"]
    for at, (token, offset) in enumerate(zip(report["tokens"], report["text_offset"], strict=True)):
        assert choice["text"].startswith(token, offset)
        top = report["top_logprobs"][at]
        assert top[token] == logprob(ids[at])
        assert sorted(top.values(), reverse=True) == [value for _, value in top_of(ids[at], 2)]
    (choice,) = ask(client, logprobs=0).json()["choices"]
    tops = choice["logprobs"]["top_logprobs"]
    assert tops == [{token: value} for token, value in zip(report["tokens"], report["token_logprobs"], strict=True)]


def test_echo_puts_the_prompt_first(client: Client, engine: FakeEngine) -> None:
    engine.add("policy", 2)
    completion = says(engine, " and")
    (choice,) = ask(client, model="policy", echo=True, logprobs=1, max_tokens=1).json()["choices"]
    prompt = engine.tokenizer.encode("the cat")
    report = choice["logprobs"]
    assert choice["text"] == "the cat and"
    assert "".join(report["tokens"]) == choice["text"]
    assert report["token_logprobs"] == [None, *map(logprob, prompt[1:]), *map(logprob, completion)]
    assert report["top_logprobs"][0] is None and all(report["top_logprobs"][1:])
    assert {len(report[name]) for name in report} == {len(prompt) + len(completion)}
    for token, offset in zip(report["tokens"], report["text_offset"], strict=True):
        assert choice["text"].startswith(token, offset)
    # the version that scored the prompt also samples
    assert engine.submitted[-1][1][0].policy == PolicyAddress("policy", number=2)


def test_echo_alone_samples_nothing(client: Client, engine: FakeEngine) -> None:
    """As lm-eval asks for the likelihood of given tokens."""
    response = ask(client, [[5, 6, 7], [8, 9]], echo=True, logprobs=1, max_tokens=0)
    body = response.json()
    CompletionsReply.model_validate(body)
    assert not engine.submitted
    assert [choice["logprobs"]["token_logprobs"] for choice in body["choices"]] == [
        [None, logprob(6), logprob(7)],
        [None, logprob(9)],
    ]
    assert [choice["finish_reason"] for choice in body["choices"]] == ["length", "length"]
    assert body["choices"][0]["text"] == engine.tokenizer.decode([5, 6, 7])
    assert body["usage"]["completion_tokens"] == 0
    assert response.headers["x-policy-digest"] == BASE_DIGEST
    (chunk,) = events(ask(client, [5, 6, 7], echo=True, logprobs=1, max_tokens=0, stream=True))
    assert chunk["choices"] == body["choices"][:1]


def test_an_echoed_string_comes_back_as_it_was(client: Client, engine: FakeEngine) -> None:
    """Special tokens that stand in the text stay in it; the text of the completion has none."""
    text = "<|user|>你好😀 hat<|end|>"
    says(engine, "!", FinishReason.STOP, engine.tokenizer.encode("!")[0])
    (choice,) = ask(client, text, echo=True, logprobs=0).json()["choices"]
    assert choice["text"] == text
    report = choice["logprobs"]
    assert report["tokens"][0] == "<|user|>"
    assert report["text_offset"][-1] == len(text)
    for token, offset in zip(report["tokens"][:-1], report["text_offset"], strict=False):
        assert token.startswith("bytes:") or choice["text"].startswith(token, offset)


def test_processed_logprobs_are_those_of_sampling(client: Client, engine: FakeEngine) -> None:
    ids = says(engine, " and")
    (choice,) = ask(client, logprobs=0, logprobs_mode="processed_logprobs").json()["choices"]
    assert choice["logprobs"]["token_logprobs"] == [sampling_logprob(id) for id in ids]
    assert choice["rollout"]["logprobs_mode"] == "processed_logprobs"


def test_stop_strings_are_cut_or_kept(client: Client, engine: FakeEngine) -> None:
    ids = says(engine, " and!", FinishReason.STOP, "!")
    (choice,) = ask(client, stop="!", return_token_ids=True, logprobs=0).json()["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (" and", "stop", "!")
    assert choice["token_ids"] == ids and len(choice["logprobs"]["tokens"]) == len(ids)
    assert max(choice["logprobs"]["text_offset"]) <= len(choice["text"])
    (choice,) = ask(client, stop="!", include_stop_str_in_output=True).json()["choices"]
    assert choice["text"] == " and!"


@pytest.mark.parametrize("kept", [False, True])
def test_a_stop_token_begins_behind_the_text_before_it(client: Client, engine: FakeEngine, kept: bool) -> None:
    """Whether it is shown or not, and behind an incomplete character too."""
    half, last = engine.tokenizer.convert_tokens_to_ids("Ã"), engine.tokenizer.encode("!")[0]
    engine.script = lambda request, sample: Row([half, last], FinishReason.STOP, last)
    asked = {"stop_token_ids": [last], "include_stop_str_in_output": kept, "logprobs": 0, "return_token_ids": True}
    (choice,) = ask(client, **asked).json()["choices"]
    assert choice["text"] == ("\ufffd!" if kept else "\ufffd")
    assert choice["logprobs"]["text_offset"] == [0, 1]
    assert joined(events(ask(client, stream=True, **asked))) == choice


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("text", ["naïve 你好世界 😀😁!", " the hat and the cat", "x"])
def test_a_stream_adds_up_to_the_whole_reply(client: Client, engine: FakeEngine, text: str, echo: bool) -> None:
    says(engine, text)
    fields: dict[str, Any] = {"logprobs": 1, "return_token_ids": True, "echo": echo, "n": 2}
    whole = ask(client, ["the cat", "😀"], **fields).json()
    chunks = events(ask(client, ["the cat", "😀"], stream=True, **fields))
    for chunk in chunks:
        CompletionsReply.model_validate(chunk)
        assert chunk["usage"] is None
        assert "\ufffd" not in chunk["choices"][0]["text"]
    assert len(chunks) > len(whole["choices"])
    for choice in whole["choices"]:
        assert joined(chunks, choice["index"]) == choice
    assert whole["choices"][0]["text"] == ("the cat" if echo else "") + text


def test_a_stream_never_shows_what_a_stop_string_takes_back(client: Client, engine: FakeEngine) -> None:
    says(engine, "a the\n\n", FinishReason.STOP, "\n\n")
    chunks = events(ask(client, stop=["\n\n", "the cat"], stream=True))
    assert joined(chunks)["text"] == "a the"
    # nor does it keep back for good what only began like one
    says(engine, "a the ca\nb")
    chunks = events(ask(client, stop=["\n\n", "the cat"], stream=True))
    assert joined(chunks)["text"] == "a the ca\nb"


@pytest.mark.parametrize("include", [False, True])
def test_streamed_tokens_of_a_stop_string_begin_where_the_text_is_cut(
    client: Client, engine: FakeEngine, include: bool
) -> None:
    ids = says(engine, "hat qxzq", FinishReason.STOP, "qxzq")
    assert len(ids) >= 6
    fields = {"stop": ["qxzq", "qxq"], "logprobs": 1, "return_token_ids": True, "include_stop_str_in_output": include}
    (whole,) = ask(client, echo=True, **fields).json()["choices"]
    assert joined(events(ask(client, echo=True, stream=True, **fields))) == whole
    offsets = whole["logprobs"]["text_offset"][-4:]
    assert offsets == [len("the cathat ") + (at if include else 0) for at in range(4)]


def test_a_stream_ends_with_usage_if_asked(client: Client, engine: FakeEngine) -> None:
    ids = says(engine, " and")
    *_, last = events(ask(client, stream=True, stream_options={"include_usage": True}))
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == len(ids)
    response = ask(client, stream=True)
    assert all(chunk["choices"] for chunk in events(response))
    assert response.headers["x-policy"] == "base@0"


def test_a_fault_in_a_stream_is_its_last_event(client: Client, engine: FakeEngine) -> None:
    from rollout_server.errors import EngineFault

    def script(request: RolloutRequest, sample: int) -> Row:
        if sample == 1:
            raise EngineFault("The step failed.")
        return Row([60, 61])

    engine.script = script
    lines = [line for line in ask(client, n=2, stream=True).text.split("\n\n") if line]
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "engine_fault"
    assert "[DONE]" not in lines[-1]


def test_what_goes_together_must(client: Client, problem: Callable[..., Any]) -> None:
    problem(ask(client, max_tokens=0), 400, "invalid_field", "max_tokens")
    problem(ask(client, stream_options={"include_usage": True}), 400, "invalid_field", "stream_options")


def test_a_bias_outside_the_vocabulary_is_named(client: Client, problem: Callable[..., Any]) -> None:
    error = problem(ask(client, logit_bias={"5": 1, "99999": 1}), 400, "invalid_field", "logit_bias.99999")
    assert error["message"].startswith("logit_bias names token 99999, which is outside the vocabulary of")


def test_neutral_values_of_later_fields_are_taken(client: Client) -> None:
    fields = {"best_of": 1, "user": None}
    assert ask(client, **fields, temperature=None).status_code == 200


def test_the_streamed_text_is_that_of_rollout_text(client: Client, engine: FakeEngine) -> None:
    """Random tokens, whole characters or not: what the pieces say is what the row says."""
    import random

    generator = random.Random(0)
    for _ in range(30):
        ids = [generator.randrange(5, len(engine.tokenizer)) for _ in range(generator.randrange(1, 40))]
        engine.script = lambda request, sample, ids=ids: Row(ids)  # type: ignore[misc]
        chunks = events(ask(client, stream=True, stop=["the", "a", "qq"]))
        row = engine.tokenizer.decode(ids)
        assert joined(chunks)["text"] == row
