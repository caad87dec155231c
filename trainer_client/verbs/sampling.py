"""Sampling: what to send, and how to read the reply. No I/O; both clients make their methods out of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Unpack

import numpy as np

from trainer_client.data.arrays import is_array
from trainer_client.data.batch import RolloutBatch
from trainer_client.data.continuing import continued
from trainer_client.data.rollout import Rollout
from trainer_client.data.sampling_options import SamplingOptions
from trainer_client.verbs.json_call import BINARY, Addressed, address, post
from trainer_client.wire.call import Call, StreamCall
from trainer_client.wire.parsing import parse_line, parse_reply
from trainer_client.wire.pictures import images_of, seen, travelling, with_images
from trainer_client.wire.replies import parse_json

Prompt = str | Sequence[int] | np.ndarray | Sequence[Mapping[str, Any]] | Mapping[str, Any] | Rollout
"""Text, token ids, chat messages, a prompt object of the contract with its own `id`, `n`, `seed`, `prefix`, …, or a
row to go on with. Pictures stand in messages, or as `images` beside token ids: URLs, paths, bytes or PIL images."""
SPARE_S = 60.0
"""Seconds to wait for a reply beyond the server's own deadline."""


class RolloutOptions(SamplingOptions, total=False):
    """What `rollouts` and `stream_rollouts` take besides the prompts: sampling parameters, and these."""

    policy: Addressed
    """Default `base`. `NAME` is where the name points when a group starts; a pushed version pins exactly that one."""
    n: int
    """Samples per prompt, default 1."""
    returns: Sequence[str]
    """Default `text` and `sampling_logprobs` (`log_kept_mass` comes with it); also `entropy` and what else the server
    offers. Ids, `logprobs`, `loss_mask` and versions always come."""
    top_logprobs: int
    on_update: Literal["finish", "switch", "abort"]
    min_version: int
    """The request fails with `StalePolicy` unless the name is at this version or a later one."""
    wait_s: float
    """The request waits so many seconds for `min_version` before it fails."""
    max_staleness: int
    """Rows that fall further behind the name than this end as `superseded`."""
    timeout_s: float
    """What is not done after so many seconds ends as `aborted`."""
    return_when: Mapping[str, int]
    """`{"finished": k}`: a prompt is returned when k of its samples have finished, the others as `aborted`."""
    reward: Addressed | Mapping[str, Any]
    """The reward model that scores every row when it has ended: its name or a pushed version; or with more to say
    `{"model": …, "as": "text", "timeout_s": 5}`, where `as` is `token_ids` (default), `text` or `messages`."""
    id: str
    """Names the request, for aborting it."""


_REQUEST_FIELDS = frozenset(
    {"n", "top_logprobs", "on_update", "min_version", "wait_s", "max_staleness", "timeout_s", "return_when", "id"}
)


def rollouts(prompts: Sequence[Prompt] | RolloutBatch, **options: Unpack[RolloutOptions]) -> Call[RolloutBatch]:
    """Samples `n` rollouts of every prompt and returns when all have ended.

    prompts   a list of texts, token ids (lists, or arrays of numpy, torch or MLX), lists of chat messages, prompt
              objects of the contract, or rows to go on with (see `continued` for what a tool said in between); may be
              mixed
    options   `policy`, `n`, `max_tokens`, `temperature`, `top_p`, `seed`, `stop`, …: see `RolloutOptions`

    Raises a `ServerError` only if no row produced anything; a row that failed has `finish_reason` `error`. Not repeated
    when the connection is lost."""
    body = _rollouts_body(prompts, options)
    images = [images_of(prompt) for prompt in body["prompts"]]
    return post(
        "/v1/rollouts",
        body,
        lambda reply: with_images(parse_reply(reply), images),
        headers=BINARY,
        timeout_s=_patience(options),
    )


def stream_rollouts(prompts: Sequence[Prompt] | RolloutBatch, **options: Unpack[RolloutOptions]) -> StreamCall[Rollout]:
    """Does what `rollouts` does, but yields each row when it finishes, in that order; `RolloutBatch.of` joins them.
    Leaving the loop early ends the rows still running. Raises where the stream breaks off, so its end means that all
    came."""
    body = _rollouts_body(prompts, options, stream=True)
    images = [images_of(prompt) for prompt in body["prompts"]]
    call = post("/v1/rollouts", body, lambda reply: None)
    return StreamCall(
        method=call.method,
        path=call.path,
        parse=call.parse,
        headers=call.headers,
        body=call.body,
        timeout_s=_patience(options),
        parse_line=lambda line: _line(line, images),
    )


def _line(line: bytes, images: Sequence[tuple[str, ...]]) -> Rollout | None:
    row = parse_line(line)
    return row if row is None else seen(row, images)


def completions(prompt: Any, *, model: Addressed = "base", **fields: Any) -> Call[dict[str, Any]]:
    """`POST /v1/completions` of the OpenAI API, for evaluation: sends `fields` as they are, returns the reply as JSON.

    prompt   a string, strings, token ids, or lists of token ids, as any array too
    fields   `max_tokens`, without which the server ends a text after 16 tokens, `temperature`, `stop`, …"""
    if fields.get("stream"):
        raise ValueError("completions does not stream here: use stream_rollouts, or any OpenAI client.")
    body = {"model": address(model), "prompt": prompt, **fields}
    return post("/v1/completions", body, lambda reply: parse_json(reply.body))


def _rollouts_body(
    prompts: Sequence[Prompt] | RolloutBatch, options: RolloutOptions, *, stream: bool = False
) -> dict[str, Any]:
    if isinstance(prompts, str | bytes | Mapping):
        raise TypeError("prompts is a list of prompts: put a single one in brackets.")
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    policy = given.pop("policy", "base")
    returns = given.pop("returns", ("text", "sampling_logprobs"))
    reward = given.pop("reward", None)
    request = {name: given.pop(name) for name in list(given) if name in _REQUEST_FIELDS}
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    return {
        "policy": address(policy),
        "prompts": [_prompt(prompt) for prompt in prompts],
        "return": list(returns),
        "sampling": given,
        **request,
        **({} if reward is None else {"reward": _reward(reward)}),
        **({"stream": True} if stream else {}),
    }


def _reward(reward: Addressed | Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(reward, Mapping):
        return {"model": address(reward)}
    return {**reward, "model": address(reward["model"])} if "model" in reward else dict(reward)


def _prompt(prompt: Prompt) -> Mapping[str, Any]:
    """A prompt object; the kind is told by what is in it."""
    if isinstance(prompt, str):
        return {"text": prompt}
    if isinstance(prompt, Rollout):
        return continued(prompt)
    if isinstance(prompt, Mapping):
        return travelling(prompt)
    if is_array(prompt) and getattr(prompt, "ndim", None) != 0:
        return {"token_ids": prompt}
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
        raise TypeError(f"A prompt is text, token ids, chat messages or a mapping, not {type(prompt).__name__}.")
    if len(prompt) and isinstance(prompt[0], Mapping):
        return travelling({"messages": list(prompt)})
    return {"token_ids": prompt}


def _patience(options: RolloutOptions) -> float | None:
    timeout_s: Any = options.get("timeout_s")
    # what is no number the server refuses
    return None if timeout_s is None or isinstance(timeout_s, str) else float(timeout_s) + SPARE_S
