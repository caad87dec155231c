"""What rewards, classes and ranks are asked for with, and what is made of the replies."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from rollout_server.http.replies.safetensors_file import rewards_file
from rollout_server.schemas.pooling.classes import ClassifyRequest
from rollout_server.schemas.pooling.pairs import RerankRequest
from rollout_server.schemas.pooling.rewards import RewardsRequest
from tests.trainer_client import contract
from trainer_client import BadReply, PolicyRef
from trainer_client.verbs import classes
from trainer_client.wire.parsing import parse_reply
from trainer_client.wire.replies import Reply


def body(call: Any) -> dict[str, Any]:
    return json.loads(bytes(call.body))


def entry(scores: list[float] | None, steps: list[list[float]] | None, tokens: int) -> dict[str, Any]:
    return {"value": None, "scores": scores, "steps": steps, "tokens": tokens}


def reply_of(*entries: dict[str, Any], labels: int = 2) -> dict[str, Any]:
    about = {"policy": "rm", "version": 3, "digest": contract.DIGEST, "labels": [None] * labels, "instance": "i"}
    return {**about, "rewards": list(entries), "usage": {}}


def both(content: dict[str, Any]) -> list[classes.Rewards]:
    """The same reply in both encodings."""
    call = classes.rewards(["a"])
    binary = Reply(200, {"content-type": "application/vnd.safetensors"}, rewards_file(content))
    return [call.parse(contract.reply(content)), call.parse(binary)]


def test_every_kind_of_sequence() -> None:
    messages = [{"role": "user", "content": "hi"}]
    call = classes.rewards(
        ["a", [1, 2], np.array([3]), messages, {"text": "b", "add_special_tokens": False}],
        model=PolicyRef("rm", 3, contract.DIGEST),
        steps={"token_id": 9},
        activation="model",
    )
    sent = body(call)
    assert sent["sequences"] == [
        {"text": "a"},
        {"token_ids": [1, 2]},
        {"token_ids": [3]},
        {"messages": messages},
        {"text": "b", "add_special_tokens": False},
    ]
    assert sent["model"] == f"rm@{contract.DIGEST}"
    RewardsRequest.model_validate_json(bytes(call.body))


def test_a_batch_is_read_with_its_prompts() -> None:
    batch = parse_reply(contract.reply(contract.rollouts(contract.row(), contract.row(1))))
    sent = body(classes.rewards(batch))
    assert [own["token_ids"] for own in sent["sequences"]] == [[1, 3, 5, 6, 2], [1, 4, 5, 6, 2]]
    assert "model" not in sent


def test_rewards_in_both_encodings() -> None:
    content = reply_of(entry([1.0, -2.0], [[3.0, 4.0], [5.0, 6.0]], 7), entry([0.5, 0.25], [], 2))
    for found in both(content):
        np.testing.assert_array_equal(found.scores, [[1.0, -2.0], [0.5, 0.25]])
        np.testing.assert_array_equal(found.steps(0), [[3.0, 4.0], [5.0, 6.0]])
        assert found.steps(-1).shape == (0, 2)
        assert (found.tokens.tolist(), found.version) == ([7, 2], PolicyRef("rm", 3, contract.DIGEST))
        with pytest.raises(ValueError, match="2 labels"):
            _ = found.values
    for found in both(reply_of(entry([1.5], None, 1), labels=1)):
        assert found.values.tolist() == [1.5]
        with pytest.raises(ValueError, match="No steps"):
            found.steps(0)
    for found in both(reply_of(entry(None, [[1.0, 2.0]], 3))):
        assert np.isnan(found.scores).all()


def test_classes_and_ranks() -> None:
    call = classes.classify(["a", "b"], model="rm", activation=False, truncate_prompt_tokens=-1)
    ClassifyRequest.model_validate_json(bytes(call.body))
    data = [{"index": 0, "label": "x", "probs": [0.25, 0.75], "num_classes": 2}]
    found = call.parse(contract.reply({"data": data}))
    assert (found.probs.tolist(), found.labels) == ([[0.25, 0.75]], ("x",))
    ranking = classes.rerank("q", ["a", "b"], top_n=1)
    RerankRequest.model_validate_json(bytes(ranking.body))
    ranked = ranking.parse(contract.reply({"results": [{"index": 1, "relevance_score": 0.5}]}))
    assert ranked == (classes.Ranked(index=1, score=0.5),)


def test_what_classes_and_ranks_can_be_asked_with() -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    call = classes.classify(messages, chat_template_kwargs={"shout": True})
    ClassifyRequest.model_validate_json(bytes(call.body))
    assert body(call) == {"messages": messages, "chat_template_kwargs": {"shout": True}}
    call = classes.classify(["<|user|>hi"], add_special_tokens=False)
    ClassifyRequest.model_validate_json(bytes(call.body))
    assert body(call) == {"input": ["<|user|>hi"], "add_special_tokens": False}
    call = classes.rerank("q", ["a"], activation=False, truncate_prompt_tokens=64)
    RerankRequest.model_validate_json(bytes(call.body))
    assert (body(call)["use_activation"], body(call)["truncate_prompt_tokens"]) == (False, 64)
    assert "use_activation" not in body(classes.rerank("q", ["a"]))


def test_a_reply_that_is_none_is_named() -> None:
    with pytest.raises(BadReply, match="labels"):
        classes.rewards(["a"]).parse(contract.reply({"rewards": []}))
    with pytest.raises(BadReply, match="no table"):
        classes.rewards(["a"]).parse(contract.reply(reply_of(entry([1.0], None, 1), entry([1.0, 2.0], None, 1))))
    with pytest.raises(BadReply, match="no table"):
        classes.classify("a").parse(contract.reply({"data": [{"probs": [1.0]}, {"probs": [1.0, 2.0]}]}))
