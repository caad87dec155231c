"""Replies written by hand after the contract, for tests of the client's parsing."""

from __future__ import annotations

import json
from typing import Any

from trainer_client.wire.replies import Reply

DIGEST = "sha256:" + "a" * 64
OTHER_DIGEST = "sha256:" + "b" * 64
INSTANCE = "instance-1"


def span(version: int, start: int, end: int, digest: str = DIGEST, **fields: Any) -> dict[str, Any]:
    return {
        "policy": "policy", "version": version, "digest": digest, "label": None, "start": start, "end": end, **fields
    }  # fmt: skip


def row(prompt: int = 0, sample: int = 0, tokens: tuple[int, ...] = (5, 6, 2), **fields: Any) -> dict[str, Any]:
    """One Rollout object; `fields` replace those of the contract or add to them."""
    count = len(tokens)
    return {
        "id": f"r-{prompt}-{sample}",
        "prompt_id": None,
        "prompt_index": prompt,
        "sample_index": sample,
        "prompt_token_ids": [1, 3 + prompt],
        "token_ids": list(tokens),
        "loss_mask": [1] * count,
        "logprobs": [-0.5 - token / 100 for token in tokens],
        "sampling_logprobs": [-0.25] * count,
        "log_kept_mass": [-0.125] * count,
        "entropy": None,
        "base_logprobs": None,
        "top_logprobs": None,
        "prompt_logprobs": None,
        "versions": [span(7, 0, count)] if count else [],
        "finish_reason": "stop",
        "stop_reason": 2,
        "error": None,
        "seed": 2**53 - 1 - sample,
        "sampling": {"max_tokens": 8, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "min_tokens": 0},
        "text": "ab",
        "timings_ms": {"queued": 0.1, "prefill": 0.2, "decode": 0.3},
        "reward": None,
        **fields,
    }


def rollouts(*rows: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {
        "id": "r",
        "policy": {"name": "policy", "version": 7, "digest": DIGEST},
        "base": {"id": "tiny", "digest": OTHER_DIGEST},
        "instance": INSTANCE,
        "complete": True,
        "rollouts": list(rows),
        "usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5},
        "timings_ms": {"total": 1.0},
        **fields,
    }


def published(**fields: Any) -> dict[str, Any]:
    return {
        "name": "policy",
        "version": 7,
        "digest": DIGEST,
        "label": "step-120",
        "kind": "lora",
        "mode": "adapter",
        "rank": 8,
        "live": True,
        "unchanged": False,
        "base": {"id": "tiny", "digest": OTHER_DIGEST},
        "bytes": 1024,
        "instance": INSTANCE,
        "report": {"modules": 2, "delta_norm": 0.0, "zero_modules": ["a"]},
        "timings_ms": {"receive": 1.0, "validate": 1.0, "stage": 1.0, "activate": 0.1},
        **fields,
    }


def problem(code: str = "queue_full", *, retryable: bool = False, **fields: Any) -> dict[str, Any]:
    error = {"message": f"It was {code}.", "type": "t", "param": None, "code": code, "retryable": retryable, **fields}
    return {"error": error}


def reply(body: Any, status: int = 200, **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, {"content-type": "application/json", **named}, json.dumps(body).encode())
