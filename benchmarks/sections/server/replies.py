"""What a reply weighs and what it costs to write and to read: JSON against safetensors.

`python -m benchmarks.sections.server.replies [--rounds 7]`. Rows as the engine hands them out, encoded by the functions
of the route and read by those of the client, in one process and in turns; medians. No socket in between: both would
cross the same.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from benchmarks.measure import take_turns
from benchmarks.record import Measured, Ratio, Scale, Section, ratio
from rollout_server.http.replies.json_entries import rollout_entry
from rollout_server.http.replies.safetensors_file import rollouts_file
from rollout_server.rollout import FinishReason, PolicyVersion, Rollout, SamplingParams, Span, Timings
from trainer_client.data.batch import RolloutBatch
from trainer_client.wire.binary_rows import MEDIA_TYPE
from trainer_client.wire.parsing import parse_reply
from trainer_client.wire.replies import Reply

TOKENS, PROMPT_TOKENS, SAMPLES = 256, 64, 16
VERSION = PolicyVersion("policy", 7, "sha256:" + "5" * 64, "step-120")
ALL_PARTS = "all of these"
COUNTED = ("token_ids", "loss_mask", "logprobs", "sampling_logprobs")
"""The figure that is asked for counts these, the spans, and all that is not a prompt's; `log_kept_mass`, which always
comes along, is shown apart."""
PROMPTS = 64
WHAT = (
    "Rows as the engine hands them out, encoded by the functions of the route and read by those of the client, in "
    "one process and in turns, no socket between. Bytes are counted for a reply of 64 prompts × 16 × 256 tokens with "
    "ids, mask, both log-probabilities and spans, prompts excluded; `log_kept_mass`, which always comes along, is "
    "listed apart. Times are for the number of tokens below."
)


def content_of(prompts: int, returns: frozenset[str]) -> dict[str, Any]:
    """The content of a reply of prompts × 16 rows of 256 tokens."""
    draw = np.random.default_rng(0)

    def floats() -> tuple[float, ...]:
        return tuple((-draw.exponential(1.0, TOKENS)).astype(np.float32).tolist())

    entries = []
    for prompt in range(prompts):
        prompt_ids = tuple(draw.integers(0, 150_000, PROMPT_TOKENS).tolist())
        for sample in range(SAMPLES):
            row = Rollout(
                prompt_index=prompt,
                sample_index=sample,
                prompt_ids=prompt_ids,
                token_ids=tuple(draw.integers(0, 150_000, TOKENS).tolist()),
                logprobs=floats(),
                sampling_logprobs=floats(),
                log_kept_mass=floats(),
                spans=(Span(VERSION, 0, TOKENS),),
                finish_reason=FinishReason.LENGTH,
                stop_reason=None,
                seed=int(draw.integers(0, 2**53)),
                sampling=SamplingParams(max_tokens=TOKENS, top_p=0.95),
                timings=Timings(*(1e3 * draw.random(3)).tolist()),
            )
            entries.append(rollout_entry(row, request_id=f"ro-{0:024}", prompt_id=None, returns=returns, text=None))
    version = {"name": "policy", "version": 7, "digest": VERSION.digest}
    about = {"id": "ro", "policy": version, "base": {"id": "tiny", "digest": VERSION.digest}, "instance": "i"}
    return {**about, "complete": True, "rollouts": entries, "usage": {}, "timings_ms": {"total": 1.0}}


def read(body: bytes, media_type: str) -> RolloutBatch:
    return parse_reply(Reply(200, {"content-type": media_type}, body))


def weigh(content: dict[str, Any]) -> dict[str, float]:
    """Bytes per sampled token by part, prompts excluded but for JSON."""
    body, text = rollouts_file(content), msgspec.json.encode(content)
    header = 8 + int.from_bytes(body[:8], "little")
    arrays = json.loads(body[8:header])
    sizes = {
        name: entry["data_offsets"][1] - entry["data_offsets"][0]
        for name, entry in arrays.items()
        if name != "__metadata__"
    }
    tokens = len(content["rollouts"]) * TOKENS
    prompts = sizes["prompt_token_ids"] + sizes["prompt_offsets"]
    kept = sizes["log_kept_mass"]
    parts = {
        "ids, mask, both log-probabilities": sum(sizes[name] for name in COUNTED),
        "spans": sum(sizes[name] for name in ("span_offsets", "span_version", "span_end", "span_kv")),
        "other columns and header": sum(sizes.values()) + header - prompts - kept - sum(sizes[n] for n in COUNTED),
        ALL_PARTS: len(body) - prompts - kept,
        "and log_kept_mass": len(body) - prompts,
        "JSON, prompts included": len(text),
    }
    return {name: size / tokens for name, size in parts.items()}


def readers(text: bytes, body: bytearray) -> dict[str, Callable[[], Any]]:
    """How the client reads one reply: as JSON, and as a file with less and more looked at."""
    return {
        "JSON": lambda: read(text, "application/json"),
        "safetensors": lambda: read(body, MEDIA_TYPE),
        "safetensors, every row looked at": lambda: list(read(body, MEDIA_TYPE)),
        "safetensors, assert_synced": lambda: read(body, MEDIA_TYPE).assert_synced(VERSION.digest),
    }


def writers(content: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    return {
        "json of the standard library": lambda: json.dumps(content),
        "JSON": lambda: msgspec.json.encode(content),
        "safetensors": lambda: rollouts_file(content),
    }


def race(name: str, contenders: dict[str, Callable[[], Any]], rounds: int) -> None:
    """Medians, and the median of each round's ratio of the first contender to each."""
    seconds: dict[str, list[float]] = {key: [] for key in contenders}
    for turn in range(rounds + 1):
        for key, work in contenders.items():
            gc.collect()
            began = time.perf_counter()
            work()
            if turn:
                seconds[key].append(time.perf_counter() - began)
    first = next(iter(contenders))
    print(f"{name}:")
    for key, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(seconds[first], times, strict=True))
        print(f"  {key:36} {1e3 * statistics.median(times):9.1f} ms   {ratio:7.1f}×")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    returns = frozenset({"sampling_logprobs"})
    print(f"64 × {SAMPLES} rows × {TOKENS} tokens, bytes per sampled token, prompts excluded:")
    for name, size in weigh(content_of(64, returns)).items():
        print(f"  {name:36} {size:7.2f}")
    content = content_of(256, returns)
    text, body = msgspec.json.encode(content), bytearray(rollouts_file(content))
    million = f"{len(content['rollouts']) * TOKENS / 1e6:.2f} M tokens"
    race(f"Client reads {million}", readers(text, body), options.rounds)
    race(f"Server writes {million}", writers(content), options.rounds)


def section(scale: Scale) -> Section:
    returns = frozenset({"sampling_logprobs"})
    sizes = weigh(content_of(PROMPTS, returns))
    content = content_of(256, returns)
    text, body = msgspec.json.encode(content), bytearray(rollouts_file(content))
    reading = take_turns({f"read {n}": timed(c) for n, c in readers(text, body).items()}, "ms", scale.rounds)
    writing = take_turns({f"write {n}": timed(c) for n, c in writers(content).items()}, "ms", scale.rounds)
    return Section(
        "replies",
        "Replies: JSON and safetensors",
        WHAT,
        (
            *reading.values(),
            *writing.values(),
            *(Measured(name, "bytes per sampled token", (size,)) for name, size in sizes.items()),
        ),
        (
            Ratio(
                "bytes per sampled token, ids, mask, both log-probabilities, spans",
                (sizes[ALL_PARTS],),
                14,
                at_most=True,
            ),
            ratio("client reads JSON / safetensors", reading["read JSON"], reading["read safetensors"], 30),
            ratio(
                "the same, every row looked at",
                reading["read JSON"],
                reading["read safetensors, every row looked at"],
            ),
            ratio("server writes safetensors / JSON", writing["write safetensors"], writing["write JSON"]),
        ),
        facts={
            "rows read": len(content["rollouts"]),
            "tokens read": len(content["rollouts"]) * TOKENS,
            "samples of a prompt": SAMPLES,
        },
    )


def timed(call: Callable[[], Any]) -> Callable[[], float]:
    """Milliseconds of a call; garbage of the one before is collected outside."""

    def run() -> float:
        gc.collect()
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)

    return run


if __name__ == "__main__":
    main()
