"""The verbs: one pure function per route that says what to send and how to read the reply. No I/O but reading an
adapter directory; both clients make their methods out of these (see `client.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from os import PathLike
from types import MappingProxyType
from typing import Any, Literal, TypedDict, TypeVar, Unpack

import numpy as np

from trainer_client.arrays import is_array
from trainer_client.batch import RolloutBatch
from trainer_client.binary import MEDIA_TYPE
from trainer_client.call import Call, LookedUpCall, StreamCall
from trainer_client.continuing import continued
from trainer_client.digest import adapter_digest, adapter_kind
from trainer_client.encoding import json_body
from trainer_client.known import Sought, look
from trainer_client.names import checked, path_of
from trainer_client.parsing import (
    Scored,
    parse_line,
    parse_models,
    parse_policy,
    parse_published,
    parse_reply,
    parse_scored,
    parse_weights,
)
from trainer_client.replies import Reply, parse_json
from trainer_client.rollout import Rollout, Span
from trainer_client.sources import adapter_of
from trainer_client.tensors import safetensors_body
from trainer_client.versions import PolicyLine, PolicyRef, PublishedVersion, ServedModel

T = TypeVar("T")

BINARY: Mapping[str, str] = MappingProxyType({"accept": f"{MEDIA_TYPE}, application/json;q=0.5"})
"""Rollouts and scores are asked for as arrays; a server that only writes JSON is understood as well."""

Prompt = str | Sequence[int] | np.ndarray | Sequence[Mapping[str, Any]] | Mapping[str, Any] | Rollout
"""Text, token ids, chat messages, a prompt object of the contract with its own `id`, `n`, `seed`, `prefix`, …, or a
row to go on with."""
Match = int | str | PublishedVersion | PolicyRef
"""The version that the alias must be at: its number, its digest, or an object that has one."""
Addressed = str | PublishedVersion | PolicyRef
"""A policy by address (`NAME`, `NAME@7`, `NAME@sha256:…`, `base`), or exactly the version a push returned."""

PROBE_S = 5.0
"""Seconds to wait for the answer of a health check."""
SPARE_S = 60.0
"""Seconds to wait for a reply beyond the server's own deadline."""


class RolloutOptions(TypedDict, total=False):
    """What `rollouts` and `stream_rollouts` take besides the prompts. Everything from `max_tokens` on is sent as a
    sampling parameter; what is left out has the server's default, and what the server does not support it names."""

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
    id: str
    """Names the request, for aborting it."""

    max_tokens: int
    """What fits, if absent."""
    min_tokens: int
    temperature: float
    """Default 1.0; 0 is greedy."""
    top_p: float
    top_k: int
    min_p: float
    seed: int
    """Below 2⁵³; fresh entropy if absent."""
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int | str, float]
    """Token id → what is added to its logit, -100 to 100."""


_REQUEST_FIELDS = frozenset(
    {"n", "top_logprobs", "on_update", "min_version", "wait_s", "max_staleness", "timeout_s", "return_when", "id"}
)


# ---- weights ------------------------------------------------------------------------------------------------------


def push(
    name: str,
    source: Mapping[str, Any] | str | PathLike[str] | Any,
    config: Mapping[str, Any] | Any | None = None,
    *,
    activate: bool = True,
    label: str | None = None,
    mode: Literal["adapter", "merged"] | None = None,
    dequantize: bool = False,
    if_match: Match | None = None,
    resend: bool = False,
) -> LookedUpCall[PublishedVersion]:
    """Publishes an adapter as a new version of `name`; every rollout asked for afterwards uses it or a later one.

    source     name → array (numpy, MLX, torch, anything with `__array__`; bfloat16 too, on any device), named and laid
               out as PEFT or mlx-lm saves them; or a directory with adapter_config.json and the safetensors file of
               either; or a peft model, whose active adapter is taken with the scales that its layers have now; or an
               MLX model with mlx-lm's LoRA or DoRA layers. float64 and float8 are sent as float32, with a warning;
               what torch.compile, DDP and FSDP write into names is left out
    config     what that format's adapter_config.json holds, or a LoraConfig; only with named tensors, or a directory
               without one
    activate   False stages the version without moving the name to it
    label      your own mark, at most 64 characters, echoed wherever the version is reported
    mode       `merged` serves W + ΔW as a parameter set of its own; the server's default is `adapter`,
               and for whole tensors (kinds `delta` and `full`) `merged`, the only one they have
    dequantize lets `merged` unpack a quantised base
    if_match   fail with `PreconditionFailed` unless the name points at this version now
    resend     True uploads without asking first

    The server is asked first what it has. Weights that are live, or newest, under this name are not sent again: the
    result is that version, `unchanged`, and the name is moved to it if need be. Another label than its own is a reason
    to send. Safe to repeat. Raises `DigestMismatch` if the server did not get exactly these weights, `AdapterMismatch`
    if they do not fit the base."""
    name, label = checked(name), None if label is None else str(label)
    host, config = adapter_of(source, config)
    digest = adapter_digest(host, config)
    known = digest is not None and not resend
    served = mode or ("merged" if adapter_kind(config) in ("delta", "full") else "adapter")
    sought = Sought(name=name, digest=digest or "", mode=served, label=label, activate=activate)
    options = _given(label=label, mode=mode, dequantize="true" if dequantize else None)
    return LookedUpCall(
        method="POST",
        path="/v1/weights",
        parse=partial(parse_published, sent_digest=digest),
        query={"name": name, "activate": _flag(activate), **options},
        headers={"content-type": "application/octet-stream", **_if_match(if_match)},
        body=safetensors_body(host, config),
        idempotent=True,
        look=look(sought) if known else None,
    )


def weights() -> Call[tuple[PolicyLine, ...]]:
    """Every name with the versions the server keeps under it."""
    return Call(method="GET", path="/v1/weights", parse=parse_weights, idempotent=True)


def policy(name: str) -> Call[PolicyLine]:
    """One name with the versions the server keeps under it. Raises `UnknownPolicy`."""
    return Call(method="GET", path=path_of(name), parse=parse_policy, idempotent=True)


def activate(name: str, version: int, *, if_match: Match | None = None) -> Call[PublishedVersion]:
    """Points `name` at a kept version: promotes a staged one, or rolls back. Raises `VersionGone` if it was freed.

    Every rollout of `name` asked for afterwards uses this version or a later one."""
    return _post(
        f"{path_of(name)}/activate",
        {"version": version},
        partial(parse_published, sent_digest=None),
        headers=_if_match(if_match),
        # after a lost reply the alias has moved, and the same if_match would fail
        idempotent=if_match is None,
    )


# ---- rollouts -----------------------------------------------------------------------------------------------------


def rollouts(prompts: Sequence[Prompt] | RolloutBatch, **options: Unpack[RolloutOptions]) -> Call[RolloutBatch]:
    """Samples `n` rollouts of every prompt and returns when all have ended.

    prompts   a list of texts, token ids (lists, or arrays of numpy, torch or MLX), lists of chat messages, prompt
              objects of the contract, or rows to go on with (see `continued` for what a tool said in between); may be
              mixed
    options   `policy`, `n`, `max_tokens`, `temperature`, `top_p`, `seed`, `stop`, …: see `RolloutOptions`

    Raises a `ServerError` only if no row produced anything; a row that failed has `finish_reason` `error`. Not repeated
    when the connection is lost."""
    return _post(
        "/v1/rollouts", _rollouts_body(prompts, options), parse_reply, headers=BINARY, timeout_s=_patience(options)
    )


def stream_rollouts(prompts: Sequence[Prompt] | RolloutBatch, **options: Unpack[RolloutOptions]) -> StreamCall[Rollout]:
    """Does what `rollouts` does, but yields each row when it finishes, in that order; `RolloutBatch.of` joins them.
    Leaving the loop early ends the rows still running. Raises where the stream breaks off, so its end means that all
    came."""
    call = _post("/v1/rollouts", _rollouts_body(prompts, options, stream=True), lambda reply: None)
    return StreamCall(
        method=call.method,
        path=call.path,
        parse=call.parse,
        headers=call.headers,
        body=call.body,
        timeout_s=_patience(options),
        parse_line=parse_line,
    )


# ---- the rest -----------------------------------------------------------------------------------------------------


def logprobs(
    sequences: RolloutBatch | Sequence[Sequence[int] | np.ndarray | Mapping[str, Any]],
    *,
    policy: Addressed = "base",
    temperature: float = 1.0,
    returns: Sequence[str] = (),
    top_logprobs: int | None = None,
    versions: Sequence[Sequence[Span | Mapping[str, Any]] | None] | None = None,
) -> Call[Scored]:
    """Log-probabilities of given tokens under a policy, by teacher forcing.

    sequences    token ids each (lists, or any arrays), scored from position 0 (whose value is NaN); or `{"token_ids",
                 "start"}`; or a batch, scored over its completions, so that the flat result lines up with
                 `batch.logprobs`
    temperature  divides the logits first
    returns      `entropy`
    versions     per sequence the spans to read it under instead of `policy`, or None; `batch.spans` checks rows that
                 switched on the way, each token under the version that sampled it, on the same KV"""
    entries = sequences.sequences if isinstance(sequences, RolloutBatch) else [_sequence(entry) for entry in sequences]
    if versions is not None:
        if len(versions) != len(entries):
            raise ValueError(f"There are {len(entries)} sequences, but versions for {len(versions)}.")
        entries = [
            entry if spans is None else {**entry, "versions": [_span(span) for span in spans]}
            for entry, spans in zip(entries, versions, strict=True)
        ]
    body = {"policy": _address(policy), "sequences": entries, "temperature": temperature, "return": list(returns)}
    body |= _given(top_logprobs=top_logprobs)
    return _post("/v1/logprobs", body, parse_scored, headers=BINARY, idempotent=True)


def completions(prompt: Any, *, model: Addressed = "base", **fields: Any) -> Call[dict[str, Any]]:
    """`POST /v1/completions` of the OpenAI API, for evaluation: sends `fields` as they are, returns the reply as JSON.

    prompt   a string, strings, token ids, or lists of token ids, as any array too
    fields   `max_tokens`, without which the server ends a text after 16 tokens, `temperature`, `stop`, …"""
    if fields.get("stream"):
        raise ValueError("completions does not stream here: use stream_rollouts, or any OpenAI client.")
    body = {"model": _address(model), "prompt": prompt, **fields}
    return _post("/v1/completions", body, lambda reply: parse_json(reply.body))


def models() -> Call[tuple[ServedModel, ...]]:
    """What can be asked for: the base, names, and kept versions, with context length, vocabulary and digest."""
    return Call(method="GET", path="/v1/models", parse=parse_models, idempotent=True)


def health() -> Call[bool]:
    """Whether the server's engine lives and answers. Asked once; raises `ServerUnreachable` if nobody answers."""
    return _yes_or_no("/health")


def ready() -> Call[bool]:
    """Whether the server has its model and can sample. Asked once; raises `ServerUnreachable` if nobody answers."""
    return _yes_or_no("/ready")


# ---- how a body is made -------------------------------------------------------------------------------------------


def _post(path: str, body: Mapping[str, Any], parse: Callable[[Reply], T], **about: Any) -> Call[T]:
    headers = {"content-type": "application/json", **about.pop("headers", {})}
    return Call(method="POST", path=path, parse=parse, headers=headers, body=json_body(body), **about)


def _yes_or_no(path: str) -> Call[bool]:
    return Call(method="GET", path=path, parse=lambda reply: reply.status < 400, accepts=(503,), timeout_s=PROBE_S)


def _rollouts_body(
    prompts: Sequence[Prompt] | RolloutBatch, options: RolloutOptions, *, stream: bool = False
) -> dict[str, Any]:
    if isinstance(prompts, str | bytes | Mapping):
        raise TypeError("prompts is a list of prompts: put a single one in brackets.")
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    policy = given.pop("policy", "base")
    returns = given.pop("returns", ("text", "sampling_logprobs"))
    request = {name: given.pop(name) for name in list(given) if name in _REQUEST_FIELDS}
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    return {
        "policy": _address(policy),
        "prompts": [_prompt(prompt) for prompt in prompts],
        "return": list(returns),
        "sampling": given,
        **request,
        **({"stream": True} if stream else {}),
    }


def _prompt(prompt: Prompt) -> Mapping[str, Any]:
    """A prompt object; the kind is told by what is in it."""
    if isinstance(prompt, str):
        return {"text": prompt}
    if isinstance(prompt, Rollout):
        return continued(prompt)
    if isinstance(prompt, Mapping):
        return prompt
    if is_array(prompt) and getattr(prompt, "ndim", None) != 0:
        return {"token_ids": prompt}
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
        raise TypeError(f"A prompt is text, token ids, chat messages or a mapping, not {type(prompt).__name__}.")
    if len(prompt) and isinstance(prompt[0], Mapping):
        return {"messages": list(prompt)}
    return {"token_ids": prompt}


def _sequence(entry: Sequence[int] | np.ndarray | Mapping[str, Any]) -> Mapping[str, Any]:
    return entry if isinstance(entry, Mapping) else {"token_ids": entry}


def _span(span: Span | Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(span, Span):
        return span
    return {name: value for name, value in asdict(span).items() if value is not None}


def _address(policy: Addressed) -> str:
    return policy if isinstance(policy, str) else f"{policy.name}@{policy.digest}"


def _if_match(match: Match | None) -> dict[str, str]:
    if match is None:
        return {}
    return {"if-match": f'"{getattr(match, "digest", match)}"'}


def _patience(options: RolloutOptions) -> float | None:
    timeout_s: Any = options.get("timeout_s")
    # what is no number the server refuses
    return None if timeout_s is None or isinstance(timeout_s, str) else float(timeout_s) + SPARE_S


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
