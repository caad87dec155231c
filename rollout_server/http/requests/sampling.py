"""Request fields → `SamplingParams` and row seeds."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from rollout_server.errors import InvalidField
from rollout_server.grammar import Constraint
from rollout_server.quoting import quoted
from rollout_server.rollout import MAX_SEED, SamplingParams, row_seed
from rollout_server.schemas.fields import SamplingNumbers, stops
from rollout_server.schemas.openai.options import OpenAIRequest
from rollout_server.schemas.rollouts import SamplingOptions


def sampling_params(
    options: SamplingOptions | OpenAIRequest, max_tokens: int, constraint: Constraint | None, *, prefix: str = ""
) -> SamplingParams:
    """`constraint` is what `grammars.constraint_of` made of the same options.

    Raises `InvalidField` whose field has `prefix` in front, the place of the options in the request."""
    try:
        return SamplingParams(
            **{name: getattr(options, name) for name in SamplingNumbers.model_fields},
            max_tokens=max_tokens,
            stop=stops(options.stop),
            stop_token_ids=tuple(options.stop_token_ids),
            logit_bias=tuple(sorted((int(token), value) for token, value in options.logit_bias.items())),
            constraint=constraint,
        )
    except InvalidField as error:
        raise InvalidField(f"{prefix}{error.message}", param=f"{prefix}{error.param}") from error


def fresh_seed() -> int:
    """A random seed, for a request that gives none."""
    return secrets.randbelow(MAX_SEED + 1)


def row_seeds(seed: int, own_seed: int | None, prompt_index: int, n: int) -> tuple[int, ...]:
    """One seed per sample. A prompt's own seed counts as if the prompt had index 0."""
    if own_seed is not None:
        seed, prompt_index = own_seed, 0
    return tuple(row_seed(seed, prompt_index, sample) for sample in range(n))


def check_rows(counts: Sequence[int], limit: int, places: Sequence[str] | None = None) -> None:
    """Raises where a request asks for too many rows, before anything of that size is made. `places` names the field
    that each count comes from, `n` if not given."""
    rows = sum(counts)
    if rows > limit:
        most = max(range(len(counts)), key=lambda index: counts[index])
        raise InvalidField(
            f"The request asks for {quoted(rows)} rows; at most {limit} are taken at once (--max-rows-per-request).",
            param=places[most] if places else "n",
        )
