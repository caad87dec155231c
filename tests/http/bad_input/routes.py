"""A right body for every route that reads JSON."""

from __future__ import annotations

from typing import Any

JSON_ROUTES: dict[str, dict[str, Any]] = {
    "/v1/rollouts": {"policy": "base", "prompts": [{"token_ids": [1, 2]}]},
    "/v1/logprobs": {"policy": "base", "sequences": [{"token_ids": [1, 2]}]},
    "/v1/completions": {"model": "base", "prompt": [1, 2]},
    "/v1/chat/completions": {"model": "base", "messages": [{"role": "user", "content": "hi"}]},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [1, 2]},
    "/v1/abort": {"ids": ["nobody"]},
    "/v1/pause": {"mode": "wait"},
    "/v1/weights/policy/activate": {"version": 2},
}
