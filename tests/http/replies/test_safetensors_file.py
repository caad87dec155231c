"""Both encodings of a reply say the same, and the binary one is laid out as the contract says."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
from litestar.testing import TestClient
from safetensors import safe_open
from safetensors.numpy import load, save

from rollout_server.http.replies.json_entries import rollout_entry
from rollout_server.http.replies.safetensors_file import rollouts_file, scores_file
from rollout_server.rollout import (
    FinishReason,
    PolicyVersion,
    Rollout,
    RowError,
    SamplingParams,
    Span,
    Timings,
)
from trainer_client.data.batch import RolloutBatch
from trainer_client.errors import BadReply
from trainer_client.wire.parsing import parse_reply, parse_scored
from trainer_client.wire.replies import Reply

Client = TestClient[Any]
BINARY = {"accept": "application/vnd.safetensors"}
EVERYTHING = frozenset({"text", "sampling_logprobs", "entropy", "prompt_logprobs"})
NAMES = [f"sha256:{digit * 64}" for digit in "0123456789"]


def floats(draw: np.random.Generator, count: int, missing: float = 0.0) -> tuple[float, ...]:
    """float32 values, as the engine hands them out; some are NaN."""
    values = draw.normal(size=count).astype(np.float32)
    values[draw.random(count) < missing] = np.nan
    return tuple(values.tolist())


def spans(draw: np.random.Generator, tokens: int) -> tuple[Span, ...]:
    cuts = sorted({0, tokens, *draw.integers(0, tokens + 1, 2).tolist()}) if tokens else [0]
    made = []
    for start, end in pairwise(cuts):
        number = int(draw.integers(1, 4))
        # now and then another policy, or another label, of the same number
        name = "other" if draw.random() < 0.1 else "policy"
        label = "late" if draw.random() < 0.1 else None
        kv = [None, "carried", "recomputed"][int(draw.integers(3))]
        made.append(Span(PolicyVersion(name, number, NAMES[number], label), start, end, kv))
    return tuple(made)


def row(draw: np.random.Generator, prompt: int, sample: int, prompt_ids: tuple[int, ...], shared: Any) -> Rollout:
    tokens = int(draw.choice([0, 1, 2, 9]))
    failed = draw.random() < 0.15
    lacking = failed and draw.random() < 0.5
    top = tuple(
        tuple((int(draw.integers(500)), float(np.float32(draw.normal()))) for _ in range(2)) for _ in range(tokens)
    )
    return Rollout(
        prompt_index=prompt,
        sample_index=sample,
        prompt_ids=prompt_ids,
        token_ids=tuple(draw.integers(0, 2**31 - 1, tokens).tolist()),
        logprobs=floats(draw, tokens),
        sampling_logprobs=floats(draw, tokens),
        log_kept_mass=floats(draw, tokens, 0.3),
        spans=spans(draw, tokens),
        finish_reason=FinishReason.ERROR if failed else list(FinishReason)[int(draw.integers(4))],
        stop_reason=[None, 7, "\n\"'\\ \u2028 ü", "timeout"][int(draw.integers(4))],
        seed=int(draw.integers(0, 2**53)),
        sampling=SamplingParams(max_tokens=int(draw.integers(8, 10)), stop=("\n\n", "ü")),
        timings=Timings(*(round(float(value), 3) for value in draw.random(3))),
        entropy=None if lacking else floats(draw, tokens),
        top_logprobs=None if lacking else top,
        prompt_logprobs=None if lacking else shared,
        error=RowError("engine_fault", "It broke: “ü”.") if failed else None,
    )


def reply_of(seed: int, returns: frozenset[str] = EVERYTHING) -> tuple[dict[str, Any], list[Rollout]]:
    """The content of a reply with random rows of every kind."""
    draw = np.random.default_rng(seed)
    rows: list[Rollout] = []
    entries = []
    for prompt in range(int(draw.integers(1, 4))):
        prompt_ids = tuple(draw.integers(0, 500, int(draw.integers(1, 5))).tolist())
        shared = (None, *floats(draw, len(prompt_ids) - 1))
        for sample in range(int(draw.integers(1, 5))):
            made = row(draw, prompt, sample, prompt_ids, shared)
            if "entropy" not in returns:
                made = dataclasses.replace(made, entropy=None, top_logprobs=None, prompt_logprobs=None)
            rows.append(made)
            text = 'a\u2028"b\\ ü' if "text" in returns else None
            own = None if prompt else "p-0"
            entries.append(rollout_entry(made, request_id="r", prompt_id=own, returns=returns, text=text))
    content = {
        "id": "r",
        "policy": {"name": "policy", "version": 3, "digest": NAMES[3], "label": None},
        "base": {"id": "tiny", "digest": NAMES[0]},
        "instance": "i",
        "complete": False,
        "rollouts": entries,
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 4,
            "total_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
        "timings_ms": {"total": 1.5},
    }
    return content, rows


def read_json(content: Any) -> RolloutBatch:
    return parse_reply(Reply(200, {"content-type": "application/json"}, msgspec.json.encode(content)))


def read_binary(content: Any) -> RolloutBatch:
    return parse_reply(Reply(200, {"content-type": BINARY["accept"]}, bytearray(rollouts_file(content))))


def same(one: Any, other: Any) -> bool:
    """Bit for bit, but for NaN, whose bits may differ."""
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
    return type(one) is type(other) and one == other


def fields_of(thing: Any) -> dict[str, Any]:
    return {field.name: getattr(thing, field.name) for field in dataclasses.fields(thing)}


@pytest.mark.parametrize("returns", [EVERYTHING, frozenset({"sampling_logprobs"}), frozenset()], ids=len)
def test_every_rollout_comes_through_both_encodings_unchanged(returns: frozenset[str]) -> None:
    kinds = set()
    for seed in range(120):
        content, rows = reply_of(seed, returns)
        json_batch, binary_batch = read_json(content), read_binary(content)
        assert len(json_batch) == len(binary_batch) == len(rows)
        for original, one, other in zip(rows, json_batch, binary_batch, strict=True):
            kinds.add((original.finish_reason, len(original.spans), original.entropy is None))
            for name, value in fields_of(one).items():
                assert same(value, getattr(other, name)), (seed, name, value, getattr(other, name))
            check_against(original, other, returns)
        for name, value in fields_of(json_batch).items():
            # an array that no row of the reply has any token for may be absent in one and empty in the other
            if name != "rollouts" and not (isinstance(value, np.ndarray) and not value.size):
                assert same(value, getattr(binary_batch, name)), (seed, name)
    assert len(kinds) > (20 if "entropy" in returns else 15)


def check_against(original: Rollout, read: Any, returns: frozenset[str]) -> None:
    """What the client holds is what the engine made, float32 bits included."""
    assert read.token_ids.tolist() == list(original.token_ids)
    assert read.prompt_token_ids.tolist() == list(original.prompt_ids)
    pairs = [("logprobs", True), ("sampling_logprobs", "sampling_logprobs" in returns), ("entropy", True)]
    for name, asked in pairs:
        values = getattr(original, name) if asked else None
        found = getattr(read, name)
        if found is None or values is None:
            # a row that failed early has NaN where others of its reply have values
            assert values is None and (found is None or np.isnan(found).all()), name
        else:
            assert found.tobytes() == np.array(values, np.float32).tobytes(), name
    assert (read.seed, read.stop_reason, read.finish_reason) == (
        original.seed, original.stop_reason, original.finish_reason.value
    )  # fmt: skip
    assert [(s.policy, s.version, s.digest, s.label, s.start, s.end, s.kv) for s in read.spans] == [
        (s.version.name, s.version.number, s.version.digest, s.version.label, s.start, s.end, s.kv)
        for s in original.spans
    ]
    assert read.sampling["stop"] == list(original.sampling.stop)
    assert (read.error is None) == (original.error is None)
    if original.top_logprobs:
        assert read.top_ids.tolist() == [[id for id, _ in pairs] for pairs in original.top_logprobs]


def test_the_file_is_laid_out_as_the_contract_says(tmp_path: Any) -> None:
    content, rows = reply_of(5)
    (tmp_path / "reply").write_bytes(rollouts_file(content))
    with safe_open(tmp_path / "reply", "np") as file:
        metadata = file.metadata()
        arrays = {name: file.get_tensor(name) for name in list(file.keys())}
    tokens, count = sum(len(row.token_ids) for row in rows), len(rows)
    prompts = len({row.prompt_index for row in rows})
    assert {name: (str(array.dtype), array.shape) for name, array in arrays.items()} == {
        "token_ids": ("int32", (tokens,)),
        **dict.fromkeys(("logprobs", "sampling_logprobs", "log_kept_mass", "entropy"), ("float32", (tokens,))),
        "loss_mask": ("uint8", (tokens,)),
        "offsets": ("int64", (count + 1,)),
        "prompt_index": ("int32", (count,)),
        "sample_index": ("int32", (count,)),
        "seed": ("int64", (count,)),
        "finish_reason": ("uint8", (count,)),
        "prompt_token_ids": ("int32", (arrays["prompt_offsets"][-1],)),
        "prompt_offsets": ("int64", (prompts + 1,)),
        "prompt_logprobs": ("float32", (arrays["prompt_offsets"][-1],)),
        "top_ids": ("int32", (tokens, 2)),
        "top_logprobs": ("float32", (tokens, 2)),
        "span_offsets": ("int64", (count + 1,)),
        "span_version": ("int32", (arrays["span_offsets"][-1],)),
        "span_end": ("int64", (arrays["span_offsets"][-1],)),
        "span_kv": ("uint8", (arrays["span_offsets"][-1],)),
    }
    assert metadata["format"] == "1"
    said = {name: json.loads(text) for name, text in metadata.items() if name != "format"}
    assert said.keys() == {"texts", "stop_reasons", "ids", "prompt_ids", "policies", "reply"}
    assert said["ids"] == [f"r/{row.prompt_index}/{row.sample_index}" for row in rows]
    assert said["stop_reasons"] == [row.stop_reason for row in rows]
    assert said["prompt_ids"] == ["p-0"] + [None] * (prompts - 1)
    assert set(said["policies"]["policy"]["3"]) == {"digest", "label"}
    assert said["reply"].keys() == content.keys()
    assert arrays["finish_reason"].tolist() == [list(FinishReason).index(row.finish_reason) for row in rows]
    ends = np.split(arrays["span_end"], arrays["span_offsets"][1:-1])
    assert [end.tolist() for end in ends] == [[span.end for span in row.spans] for row in rows]


def test_the_clients_arrays_are_the_reply_itself() -> None:
    content = bytearray(rollouts_file(reply_of(5)[0]))
    batch = parse_reply(Reply(200, {"content-type": BINARY["accept"]}, content))
    whole = np.frombuffer(content, np.uint8)
    for name in ("token_ids", "logprobs", "sampling_logprobs", "loss_mask", "offsets", "top_logprobs", "seeds"):
        array = getattr(batch, name)
        assert np.shares_memory(array, whole) and array.flags.writeable and array.flags.aligned, name
    filled = next(row for row in batch if len(row.token_ids))
    assert np.shares_memory(filled.logprobs, batch.logprobs)
    assert batch.rollouts[0] is batch.rollouts[-len(batch)]
    assert [row.seed for row in batch.rollouts[1:]] == batch.seeds.tolist()[1:]
    joined = RolloutBatch.concatenate([batch, batch])
    assert joined.token_ids.tolist() == batch.token_ids.tolist() * 2
    with pytest.raises(IndexError):
        batch.rollouts[len(batch)]


def test_a_file_that_contradicts_itself_is_refused() -> None:
    content, rows = reply_of(5)
    arrays, metadata = load(rollouts_file(content)), {}
    with_metadata = rollouts_file(content)
    header = json.loads(with_metadata[8 : 8 + int.from_bytes(with_metadata[:8], "little")])
    metadata = header["__metadata__"]

    def refused(match: str, about: dict[str, str] | None = None, **changed: Any) -> None:
        kept = {name: array for name, array in (arrays | changed).items() if array is not None}
        body = save(kept, metadata if about is None else about)
        with pytest.raises(BadReply, match=match):
            list(parse_reply(Reply(200, {"content-type": BINARY["accept"]}, body)))

    assert len(rows) > 2
    refused("format '2'", about=metadata | {"format": "2"})
    refused("'logprobs' is missing", logprobs=None)
    refused(r"'logprobs' is float64", logprobs=arrays["logprobs"].astype(np.float64))
    refused("logprobs of shape", logprobs=arrays["logprobs"][:-1])
    refused("offsets that do not", offsets=arrays["offsets"][::-1].copy())
    refused("prompts that it does not hold", prompt_index=arrays["prompt_index"] + 90)
    refused("finish_reason", finish_reason=arrays["finish_reason"] + 90)
    refused("do not tile", span_end=arrays["span_end"] + 1)
    refused("do not tile", span_end=arrays["span_end"] * 0)
    refused("span_kv", span_kv=arrays["span_kv"] + 3)
    refused("needs a list", about=metadata | {"ids": "[]"})
    refused("not JSON", about=metadata | {"ids": "["})
    refused("'rollouts' is missing", about=metadata | {"reply": "{}"})
    with pytest.raises(BadReply, match="not a safetensors file"):
        parse_reply(Reply(200, {"content-type": BINARY["accept"]}, b"{}"))


# ---- through the routes -------------------------------------------------------------------------------------------

ROLLOUTS = {
    "prompts": [{"token_ids": [1, 2, 3], "id": "a"}, {"token_ids": [4]}],
    "n": 2,
    "sampling": {"max_tokens": 5, "seed": 7},
    "return": ["text", "sampling_logprobs"],
}


@pytest.mark.parametrize(
    ("accept", "binary"),
    [
        ("application/vnd.safetensors", True),
        ("application/vnd.safetensors, application/json;q=0.5", True),
        ("Application/VND.safetensors ; q=0.5, */*;q=0.1", True),
        ("application/json, application/vnd.safetensors;q=0.5", False),
        ("application/vnd.safetensors;q=0", False),
        ("application/vnd.safetensors;q=0.2, application/*", False),
        ("*/*", False),
        ("text/html", False),
        ("", False),
    ],
)
def test_the_accept_header_chooses_the_encoding(client: Client, accept: str, binary: bool) -> None:
    for route, body in (("/v1/rollouts", ROLLOUTS), ("/v1/logprobs", {"sequences": [{"token_ids": [1, 2]}]})):
        response = client.post(route, json={"policy": "base", **body}, headers={"accept": accept})
        assert response.status_code == 200, response.text
        expected = "application/vnd.safetensors" if binary else "application/json"
        assert response.headers["content-type"].partition(";")[0] == expected


def test_both_encodings_of_one_request_agree(client: Client) -> None:
    body = {"policy": "base", **ROLLOUTS}
    as_json = parse_reply(reply(client.post("/v1/rollouts", json=body)))
    as_file = parse_reply(reply(client.post("/v1/rollouts", json=body, headers=BINARY)))
    assert as_file.token_ids.tolist() == as_json.token_ids.tolist()
    assert as_file.logprobs.tobytes() == as_json.logprobs.tobytes()
    assert as_file.texts == as_json.texts and as_file.spans == as_json.spans
    assert (as_file.policy, as_file.instance, as_file.usage) == (as_json.policy, as_json.instance, as_json.usage)
    assert [row.prompt_id for row in as_file] == ["a", "a", None, None]


def test_scores_agree_in_both_encodings(client: Client) -> None:
    body = {
        "policy": "base",
        "sequences": [{"token_ids": [1, 2, 3, 4]}, {"token_ids": [5, 6], "start": 1}],
        "return": ["entropy"],
        "top_logprobs": 2,
    }
    as_json = parse_scored(reply(client.post("/v1/logprobs", json=body)))
    as_file = parse_scored(reply(client.post("/v1/logprobs", json=body, headers=BINARY)))
    for name, value in fields_of(as_json).items():
        assert same(value, getattr(as_file, name)), name
    assert math.isnan(as_file.logprobs[0]) and as_file.top_ids is not None
    assert as_file.top_ids.shape == (5, 2) and len(as_file[1]) == 1


def test_what_else_a_sequence_says_stays_with_it() -> None:
    entry = {"logprobs": (None, -1.0), "entropy": None, "top_logprobs": None, "versions": [{"policy": "p"}]}
    content = {"sequences": [entry], "versions": [], "temperature": 1.0}
    header = scores_file(content)
    said = json.loads(json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]["reply"])
    assert said == {**content, "sequences": [{"versions": [{"policy": "p"}]}]}


def reply(response: Any) -> Reply:
    assert response.status_code == 200, response.text
    return Reply(response.status_code, response.headers, bytearray(response.content))
