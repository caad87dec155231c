from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tests.trainer_client import contract
from trainer_client.data.versions import PolicyRef
from trainer_client.errors import AdapterMismatch, BadReply, DigestMismatch, EngineFault, QueueFull, ServerError
from trainer_client.wire.json_rows import parse_rollout
from trainer_client.wire.parsing import (
    parse_line,
    parse_models,
    parse_policy,
    parse_published,
    parse_reply,
    parse_scored,
    parse_weights,
)
from trainer_client.wire.replies import LineBuffer, Reply, parse_error


def without(entry: dict[str, Any], field: str) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != field}


def line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry).encode()


# ---- rollouts -----------------------------------------------------------------------------------------------------


def test_a_rollout_is_read_whole() -> None:
    row = parse_rollout(
        contract.row(
            3, 1,
            versions=[contract.span(6, 0, 2, label="a"), contract.span(7, 2, 3, kv="carried")],
            prompt_id="p3", entropy=[0.1, None, 0.3], top_logprobs=[[[5, -0.5]]] * 3, novelty=1,
        )
    )  # fmt: skip
    assert (row.prompt_index, row.sample_index, row.prompt_id, row.seed) == (3, 1, "p3", 2**53 - 2)
    assert row.prompt_token_ids.tolist() == [1, 6]
    assert [(span.version, span.start, span.end, span.label, span.kv) for span in row.spans] == [
        (6, 0, 2, "a", None),
        (7, 2, 3, None, "carried"),
    ]
    assert row.entropy is not None
    assert np.isnan(row.entropy).tolist() == [False, True, False]
    assert (row.finish_reason, row.stop_reason, row.text, row.error) == ("stop", 2, "ab", None)
    assert row.raw["novelty"] == 1
    assert row.top_ids is not None and row.top_logprobs is not None
    assert (row.top_ids.tolist(), row.top_logprobs.tolist()) == ([[5]] * 3, [[-0.5]] * 3)
    assert row.id == "r-3-1"


def test_log_probabilities_keep_their_float32_bits() -> None:
    exact = np.random.default_rng(0).normal(size=3).astype(np.float32)
    row = parse_rollout(contract.row(logprobs=[float(value) for value in exact]))
    assert row.logprobs.tobytes() == exact.tobytes()


def test_a_failed_row_keeps_what_it_had() -> None:
    fault = {"code": "non_finite_logits", "message": "The logits were NaN."}
    row = parse_rollout(contract.row(finish_reason="error", error=fault))
    assert row.error is not None
    assert (row.error.code, len(row.token_ids)) == ("non_finite_logits", 3)


def test_a_reply_says_where_the_alias_was() -> None:
    batch = parse_reply(contract.reply(contract.rollouts(contract.row(), complete=False, novelty=[])))
    assert batch.policy == PolicyRef("policy", 7, contract.DIGEST)
    assert (batch.instance, batch.complete, batch.usage["total_tokens"]) == (contract.INSTANCE, False, 5)
    nowhere = {"name": "policy", "version": None, "digest": None}
    assert parse_reply(contract.reply(contract.rollouts(policy=nowhere))).policy is None


@pytest.mark.parametrize(
    "field",
    ["prompt_index", "sample_index", "prompt_token_ids", "token_ids", "loss_mask", "logprobs", "versions",
     "finish_reason", "seed"],
)  # fmt: skip
def test_a_missing_field_of_a_rollout_is_named(field: str) -> None:
    with pytest.raises(BadReply, match=f"'{field}' is missing"):
        parse_rollout(without(contract.row(), field))
    with pytest.raises(BadReply, match=f"'{field}'"):
        parse_rollout(contract.row() | {field: None})


@pytest.mark.parametrize("field", ["rollouts", "policy", "instance", "complete"])
def test_a_missing_field_of_the_reply_is_named(field: str) -> None:
    with pytest.raises(BadReply, match=f"'{field}' is missing"):
        parse_reply(contract.reply(without(contract.rollouts(contract.row()), field)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logprobs": [-1.0]}, "1 logprobs for 3 tokens"),
        ({"sampling_logprobs": [-1.0] * 4}, "4 sampling_logprobs for 3 tokens"),
        ({"logprobs": ["a", "b", "c"]}, "not numbers"),
        ({"token_ids": [1, None, 2]}, "not numbers"),
        ({"token_ids": [1, 2**40, 2]}, "not numbers"),
        ({"versions": []}, "do not tile"),
        ({"versions": [contract.span(7, 0, 2)]}, "do not tile"),
        ({"versions": [contract.span(7, 1, 3)]}, "do not tile"),
        ({"versions": [contract.span(7, 0, 2), contract.span(7, 1, 3)]}, "do not tile"),
        ({"versions": [contract.span(7, 0, 3), contract.span(7, 3, 3)]}, "do not tile"),
        ({"seed": True}, "'seed' is bool"),
        ({"prompt_token_ids": ["a"]}, "not numbers"),
        ({"versions": [7]}, "something else than objects"),
    ],
)
def test_a_rollout_that_contradicts_itself_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(BadReply, match=message) as caught:
        parse_rollout(contract.row(4, 2, **changed))
    assert "prompt 4, sample 2" in str(caught.value)


@pytest.mark.parametrize("body", [b"", b"<html>", b"[1]", b"null", b'{"rollouts": '])
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(BadReply, match=r"not (a )?JSON"):
        parse_reply(Reply(200, {"content-type": "application/json"}, body))


def test_an_encoding_that_was_not_asked_for_is_refused() -> None:
    with pytest.raises(BadReply, match=r"'text/html', which this client does not read"):
        parse_reply(Reply(200, {"content-type": "text/html"}, b""))


# ---- the stream ---------------------------------------------------------------------------------------------------


def test_lines_end_at_newlines_only_wherever_the_chunks_are_cut() -> None:
    text = "a\u2028b\x0bc\x85d\r"
    content = "\n".join([json.dumps(text, ensure_ascii=False), "", "[2]", "rest"]).encode()
    for size in (1, 2, 3, 7, len(content)):
        buffer = LineBuffer()
        lines = [line for i in range(0, len(content), size) for line in buffer.lines(content[i : i + size])]
        assert [json.loads(line) for line in lines] == [text, [2]], size
        assert "b'rest'" in buffer.unfinished()


def test_stream_lines_are_rows_an_end_or_an_error() -> None:
    row = parse_line(line(contract.row(1, 2)))
    assert row is not None
    assert (row.prompt_index, row.sample_index) == (1, 2)
    assert parse_line(line({"done": True, "complete": True, "usage": {}})) is None
    with pytest.raises(EngineFault, match="It was engine_fault") as caught:
        parse_line(line(contract.problem("engine_fault", retryable=True)))
    assert caught.value.retryable
    failed = parse_line(line(contract.row(finish_reason="error", error={"code": "engine_fault", "message": "m"})))
    assert failed is not None
    assert failed.error is not None
    for broken in (b"nonsense", b"[]", b"{}"):
        with pytest.raises(BadReply):
            parse_line(broken)


# ---- weights, models, log-probabilities ---------------------------------------------------------------------------


def test_a_published_version_is_read_whole() -> None:
    version = parse_published(contract.reply(contract.published(novelty=1)), contract.DIGEST)
    assert (version.name, version.version, version.digest, version.label) == ("policy", 7, contract.DIGEST, "step-120")
    assert (version.live, version.unchanged, version.verified, version.nbytes) == (True, False, True, 1024)
    assert version.report["modules"] == 2
    assert version.timings_ms["stage"] == 1.0
    assert not parse_published(contract.reply(contract.published()), None).verified


def test_another_digest_than_was_sent_is_an_error() -> None:
    with pytest.raises(DigestMismatch, match="policy@7"):
        parse_published(contract.reply(contract.published()), contract.OTHER_DIGEST)


@pytest.mark.parametrize("field", ["name", "version", "digest", "live", "unchanged", "instance"])
def test_a_missing_field_of_a_version_is_named(field: str) -> None:
    with pytest.raises(BadReply, match=f"'{field}' is missing"):
        parse_published(contract.reply(without(contract.published(), field)), None)


def test_policies_and_their_versions() -> None:
    kept = {"version": 7, "digest": contract.DIGEST, "label": None, "kind": "lora", "mode": "adapter", "live": True,
            "pinned": False, "rows_in_use": 3, "bytes": 10, "created": 1.5}  # fmt: skip
    one = {"name": "policy", "live": 7, "versions": [kept]}
    (line,) = parse_weights(contract.reply({"policies": [one], "base": {}, "instance": "i"}))
    assert (line.name, line.live, line.instance) == ("policy", 7, "i")
    assert (line.versions[0].rows_in_use, line.versions[0].nbytes) == (3, 10)
    assert parse_policy(contract.reply({**one, "instance": "i"})) == line
    with pytest.raises(BadReply, match=r"policy 'policy'.*'digest' is missing"):
        parse_policy(contract.reply({**one, "versions": [without(kept, "digest")]}))


def test_models() -> None:
    (card,) = parse_models(
        contract.reply({"object": "list", "data": [{"id": "base", "vocab_size": 100, "eos_token_ids": [2], "new": 1}]})
    )
    assert (card.id, card.vocab_size, card.eos_token_ids, card.digest) == ("base", 100, (2,), None)


def test_scored_sequences_are_flat_with_offsets() -> None:
    version = {"policy": "base", "version": 0, "digest": contract.DIGEST, "label": None}
    entries = [{"logprobs": [None, -1.0], "entropy": [None, 2.0]}, {"logprobs": [-3.0], "entropy": [4.0]}]
    body = {"sequences": entries, "policy": {}, "versions": [version], "temperature": 0.5}
    scored = parse_scored(contract.reply(body))
    np.testing.assert_array_equal(scored.logprobs, np.array([np.nan, -1, -3], np.float32))
    np.testing.assert_array_equal(scored[1], [-3.0])
    np.testing.assert_array_equal(scored[-2], scored[0])
    assert scored.entropy is not None
    assert (len(scored), scored.entropy.tolist()[1:], scored.temperature) == (2, [2.0, 4.0], 0.5)
    assert scored.versions == (PolicyRef("base", 0, contract.DIGEST),)
    assert parse_scored(contract.reply({**body, "sequences": [{"logprobs": []}]})).entropy is None
    with pytest.raises(IndexError):
        scored[2]
    assert scored.spans == ((), ())
    told = [{**entry, "versions": [contract.span(7, 0, len(entry["logprobs"]))]} for entry in entries]
    spans = parse_scored(contract.reply({**body, "sequences": told})).spans
    assert [(span.version, span.start, span.end) for (span,) in spans] == [(7, 0, 2), (7, 0, 1)]


# ---- errors -------------------------------------------------------------------------------------------------------


def test_an_error_reply_becomes_its_class_with_all_its_fields() -> None:
    body = contract.problem("adapter_mismatch", param="weights", faults=["a", "b"], policy="p", version=3, digest="d")
    error = parse_error(contract.reply(body, 422))
    assert type(error) is AdapterMismatch
    assert (error.status, error.code, error.param, error.faults) == (422, "adapter_mismatch", "weights", ("a", "b"))
    assert (error.policy, error.version, error.digest, error.retryable) == ("p", 3, "d", False)
    assert str(error) == error.message == "It was adapter_mismatch."


def test_the_header_decides_about_retrying_and_the_body_where_there_is_none() -> None:
    body = contract.problem(retryable=False)
    assert parse_error(contract.reply(body, 429, x_should_retry="true")).retryable
    assert not parse_error(contract.reply(contract.problem(retryable=True), 429, x_should_retry="false")).retryable
    assert parse_error(contract.reply(contract.problem(retryable=True), 429)).retryable


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("1.5", 1.5), ("0", 0.0), ("-3", 0.0), ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0), ("soon", None)],
)
def test_retry_after_is_read_in_both_forms(header: str, seconds: float | None) -> None:
    assert parse_error(contract.reply(contract.problem(), 429, retry_after=header)).retry_after_s == seconds
    later = parse_error(contract.reply(contract.problem(), 429, retry_after="Fri, 31 Dec 2999 23:59:59 GMT"))
    assert isinstance(later, QueueFull)
    assert (later.retry_after_s or 0) > 1e9


@pytest.mark.parametrize("body", [b"Bad gateway", b"", b"[1]", b'{"error": "text"}', b"\xff"])
def test_an_error_of_somebody_else_is_still_a_sentence(body: bytes) -> None:
    error = parse_error(Reply(502, {}, body))
    assert type(error) is ServerError
    assert "HTTP status 502" in str(error)
    assert (error.status, error.retryable) == (502, False)
