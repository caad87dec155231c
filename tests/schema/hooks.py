"""Makes what schemathesis invents meet the served model: names that exist, token ids of its vocabulary, values that go
together. One body in four is left as it was. Loaded by its command line through SCHEMATHESIS_HOOKS."""

from __future__ import annotations

import zlib
from typing import Any

import schemathesis

from tests.schema.pooling_bodies import fitting

VOCABULARY = 300
NAMES = ("base", "policy", "policy@1")
WHOLE = {
    "max_tokens": (1, 4),
    "max_completion_tokens": (1, 4),
    "min_tokens": (0, 1),
    "n": (1, 2),
    "top_k": (0, 5),
    "start": (0, 0),
    "dimensions": (1, 8),
    "min_version": (0, 1),
    "version": (1, 1),
    "truncate_prompt_tokens": (1, 8),
    "top_n": (0, 3),
}
NUMBERS = {"temperature": (0.1, 1.0), "top_p": (0.1, 1.0), "min_p": (0.0, 1.0), "timeout_s": (5.0, 60.0)}
IDS = {"token_ids", "tokens", "stop_token_ids", "prompt", "input", "label_token_ids"}
LEFT_OUT = {
    "chat_template_kwargs",
    "tools",
    "tool_choice",
    "continue_final_message",
    "add_generation_prompt",
    "add_special_tokens",
    "tool_calls",
    "id",
}
NEEDS = {"stream_options": "stream", "top_logprobs": "logprobs"}


def _between(value: Any, bounds: tuple[Any, Any]) -> Any:
    return min(max(value, bounds[0]), bounds[1])


def _object(value: dict[str, Any]) -> dict[str, Any]:
    fields = {key: _fitting(item, key) for key, item in value.items() if key not in LEFT_OUT}
    for name, needed in NEEDS.items():
        if name in fields and "messages" in fields and not fields.get(needed):
            del fields[name]
    if "stream_options" in fields and not fields.get("stream"):
        del fields["stream_options"]
    if "max_completion_tokens" in fields:
        fields.pop("max_tokens", None)
    if "return" in fields:
        fields["return"] = ["text", "entropy"]
    if "type" in fields:  # a content part
        return fields
    kinds = ("token_ids", "text", "messages", "prompt")
    kept = next((name for name in kinds if fields.get(name)), None)
    if kept is not None:
        fields = {key: item for key, item in fields.items() if key == kept or key not in kinds}
    elif {"token_ids", "text", "messages"} & fields.keys():
        fields = {key: item for key, item in fields.items() if key not in kinds} | {"token_ids": [1, 2]}
    return fields


def _fitting(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return _object(value)
    if isinstance(value, list):
        return [_fitting(item, name) for item in value[:8]]
    if isinstance(value, str) and name in ("model", "policy"):
        return NAMES[len(value) % len(NAMES)]
    if isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer() and name not in NUMBERS:
        value = int(value)  # JSON Schema's integers may be written 1.0; ours may not
    if isinstance(value, int) and name in IDS:
        return abs(value) % VOCABULARY
    if isinstance(value, int) and name in ("top_logprobs", "logprobs"):
        return _between(value, (0, 5))
    if isinstance(value, int) and name in WHOLE:
        return _between(value, WHOLE[name])
    if isinstance(value, (int, float)) and name in NUMBERS:
        return _between(value, NUMBERS[name])
    return value


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    return body if zlib.crc32(repr(body).encode()) % 4 == 0 else fitting(context.operation.path, _fitting(body))


@schemathesis.hook
def map_path_parameters(context: Any, parameters: Any) -> Any:
    """Half of the paths name what is there."""
    if not isinstance(parameters, dict) or len(str(parameters)) % 2:
        return parameters
    present = {"name": "policy", "version": 1, "model": "policy@1"}
    return {key: present.get(key, value) for key, value in parameters.items()}
