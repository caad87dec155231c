"""Section `replies`: bytes and parse time of a reply, JSON against safetensors."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import msgspec

from benchmarks.interleaved import take_turns
from benchmarks.record import Measured, Ratio, Scale, Section, ratio
from benchmarks.replies import ALL_PARTS, SAMPLES, TOKENS, content_of, readers, weigh, writers
from rollout_server.http.replies.safetensors_file import rollouts_file

PROMPTS = 64
WHAT = (
    "Rows as the engine hands them out, encoded by the functions of the route and read by those of the client, in "
    "one process and in turns, no socket between. Bytes are counted for a reply of 64 prompts × 16 × 256 tokens with "
    "ids, mask, both log-probabilities and spans, prompts excluded; `log_kept_mass`, which always comes along, is "
    "listed apart. Times are for the number of tokens below."
)


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
