"""A right body for every route that reads JSON."""

from __future__ import annotations

from typing import Any

RECORDED: dict[str, Any] = {
    "prompt_token_ids": [1, 2],
    "token_ids": [3, 4],
    "loss_mask": [1, 1],
    "logprobs": [-1.0, -2.0],
    "versions": [{"policy": "base", "version": 0, "start": 0, "end": 2}],
}
"""What of a Rollout replay and probe cannot do without."""
JSON_ROUTES: dict[str, dict[str, Any]] = {
    "/v1/rollouts": {"policy": "base", "prompts": [{"token_ids": [1, 2]}]},
    "/v1/logprobs": {"policy": "base", "sequences": [{"token_ids": [1, 2]}]},
    "/v1/replay": {"rollouts": [RECORDED | {"seed": 5, "sampling": {"max_tokens": 2}}]},
    "/v1/probe": {"rollouts": [RECORDED | {"trainer_logprobs": [-1.5, None]}]},
    "/v1/completions": {"model": "base", "prompt": [1, 2]},
    "/v1/chat/completions": {"model": "base", "messages": [{"role": "user", "content": "hi"}]},
    "/v1/embeddings": {"model": "base", "input": [1, 2]},
    "/score": {"query": [1], "items": [[2]], "label_token_ids": [3]},
    "/pooling": {"model": "base", "input": [1, 2]},
    "/v1/rewards": {"model": "base", "sequences": [{"token_ids": [1, 2]}], "label_token_ids": [3]},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [1, 2]},
    "/v1/abort": {"ids": ["nobody"]},
    "/v1/pause": {"mode": "wait"},
    "/v1/weights/policy/activate": {"version": 2},
}
