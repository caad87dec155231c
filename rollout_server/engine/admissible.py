"""Whether the model can take what a request asks for: token ids within its vocabulary, lengths within its context."""

from __future__ import annotations

from collections.abc import Sequence

from rollout_server.engine.messages import ModelInfo
from rollout_server.errors import ContextExceeded, InvalidField
from rollout_server.rollout import RolloutRequest


def check_group(group: RolloutRequest, info: ModelInfo) -> None:
    """What can be said of a group before the engine has it."""
    _check_ids(group.prompt_ids, info.vocab_size, "prompt")
    _check_ids(group.prefix.token_ids, info.vocab_size, "prefix")
    for token in group.sampling.stop_token_ids:
        if not 0 <= token < info.vocab_size:
            raise InvalidField(
                f"Stop token id {token} is outside the vocabulary of {info.vocab_size}.", param="stop_token_ids"
            )
    total = len(group.prompt_ids) + group.sampling.max_tokens
    if total > info.max_model_len:
        raise ContextExceeded(
            f"A prompt of {len(group.prompt_ids)} tokens and max_tokens {group.sampling.max_tokens} exceed the "
            f"context of {info.max_model_len} tokens.",
            param="max_tokens",
        )
    if group.sampling.min_tokens and len({*group.sampling.stop_token_ids, *info.eos_token_ids}) >= info.vocab_size:
        raise InvalidField("min_tokens leaves no token to sample: every one of them would stop.", param="min_tokens")
    if info.row_bytes(total) > info.kv_memory:
        raise ContextExceeded(
            f"One row of {total} tokens needs more KV memory than the {info.kv_memory} bytes of --kv-memory.",
            param="max_tokens",
        )


def _check_ids(tokens: Sequence[int], vocabulary: int, param: str) -> None:
    if tokens and not (min(tokens) >= 0 and max(tokens) < vocabulary):
        wrong = next(token for token in tokens if not 0 <= token < vocabulary)
        raise InvalidField(f"Token id {wrong} is outside the vocabulary of {vocabulary}.", param=param)


def check_sequence(tokens: Sequence[int], info: ModelInfo, param: str) -> None:
    """Tokens that are only read."""
    _check_ids(tokens, info.vocab_size, param)
    if len(tokens) > info.max_model_len:
        raise ContextExceeded(
            f"A sequence has {len(tokens)} tokens; the context holds {info.max_model_len}.", param=param
        )
