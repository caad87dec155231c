"""The sampling parameters that a trainer may send, and where each of them leaves the model's distribution alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Annotated, Any, TypedDict, get_args, get_type_hints


@dataclass(frozen=True, slots=True)
class Neutral:
    """The value at which a sampling parameter leaves the model's distribution as it is."""

    value: Any


class SamplingOptions(TypedDict, total=False):
    """Sampling parameters; what is left out has the server's default, and what the server does not support it names."""

    max_tokens: int
    """What fits, if absent."""
    min_tokens: Annotated[int, Neutral(0)]
    temperature: Annotated[float, Neutral(1)]
    """Default 1.0; 0 is greedy."""
    top_p: Annotated[float, Neutral(1)]
    top_k: Annotated[int, Neutral(0)]
    min_p: Annotated[float, Neutral(0)]
    seed: int
    """Below 2⁵³; fresh entropy if absent."""
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    presence_penalty: Annotated[float, Neutral(0)]
    frequency_penalty: Annotated[float, Neutral(0)]
    repetition_penalty: Annotated[float, Neutral(1)]
    logit_bias: Annotated[Mapping[int | str, float], Neutral({})]
    """Token id → what is added to its logit, -100 to 100."""
    response_format: Annotated[Mapping[str, Any], Neutral(None)]
    """What the text has to match, as OpenAI names it."""
    structured_outputs: Annotated[Mapping[str, Any], Neutral(None)]
    """What the text has to match, as vLLM names it."""


@cache
def neutral_values() -> Mapping[str, Any]:
    """The neutral value of every parameter that changes the distribution."""
    hints = get_type_hints(SamplingOptions, include_extras=True)
    found = {name: [each.value for each in get_args(hint) if isinstance(each, Neutral)] for name, hint in hints.items()}
    return MappingProxyType({name: values[0] for name, values in found.items() if values})
