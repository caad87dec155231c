"""One rollout with everything that is known of each of its tokens, as text and numbers."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from rollout_server.http.observing.latest_rollouts import Kept
from rollout_server.http.page.frames import spans_entry
from rollout_server.http.replies.json_entries import finite, sampling_entry
from rollout_server.text.token_strings import TokenStrings

MOST_PROMPT = 16_384
"""Tokens of a prompt that are shown; the last of a longer one."""


def rollout_view(kept: Kept, strings: TokenStrings) -> dict[str, Any]:
    """What the page shows of a rollout. All lists are of the length of `token_ids`; null is a number that is not
    known."""
    rollout = kept.rollout
    prompt = rollout.prompt_ids[-MOST_PROMPT:]
    texts = pieces(strings, [*prompt, *rollout.token_ids])
    return {
        "number": kept.number,
        "request_id": kept.request_id,
        "sample": (rollout.prompt_index, rollout.sample_index),
        "ended": kept.ended,
        "prompt": "".join(texts[: len(prompt)]),
        "prompt_tokens": len(rollout.prompt_ids),
        "texts": texts[len(prompt) :],
        "token_ids": rollout.token_ids,
        "given": len(rollout.prefix),
        "logprobs": known(rollout.logprobs),
        "sampling_logprobs": known(rollout.sampling_logprobs),
        "entropy": known(rollout.entropy),
        "base_logprobs": known(rollout.base_logprobs),
        "spans": spans_entry(rollout),
        "finish_reason": str(rollout.finish_reason),
        "stop_reason": rollout.stop_reason,
        "seed": str(rollout.seed),
        "sampling": sampling_entry(rollout.sampling),
        "timings_ms": {
            "queued": round(rollout.timings.queued_ms, 1),
            "prefill": round(rollout.timings.prefill_ms, 1),
            "decode": round(rollout.timings.decode_ms, 1),
        },
        "reward": rollout.reward.value if rollout.reward else None,
    }


def known(values: Sequence[float] | None) -> list[float | None] | None:
    return None if values is None else [finite(value) for value in values]


def pieces(strings: TokenStrings, ids: Iterable[int]) -> list[str]:
    """What each token adds to the text. A character that several tokens make up is the last one's."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [decoder.decode(strings.utf8(id)) for id in ids]
