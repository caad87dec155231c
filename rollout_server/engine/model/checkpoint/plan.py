"""What to do about config.json before mlx-lm reads it: fields to hand over otherwise, bounds of the context, and what
this server cannot compute. No array is touched here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rollout_server.engine.model.checkpoint.corrections.activation import asked_for
from rollout_server.engine.model.checkpoint.corrections.rope import exact_tokens, main_part, rope_fields
from rollout_server.engine.model.checkpoint.effects import unserved
from rollout_server.engine.model.checkpoint.family import NESTED, Family, family_of
from rollout_server.engine.model.checkpoint.meaning import Meaning, meaning_of, plain
from rollout_server.engine.model.checkpoint.renames import head_dim, renamed_fields

TIED = "tie_word_embeddings"


@dataclass(frozen=True, slots=True)
class Bound:
    """Up to this many tokens the model is what config.json says."""

    tokens: int
    reason: str
    """The second half of a sentence that begins with the number."""


@dataclass(frozen=True, slots=True)
class Plan:
    family: Family
    said: Meaning
    overrides: dict[str, Any]
    """Fields for `load_model(model_config=…)`."""
    bounds: tuple[Bound, ...]
    activation: tuple[str, Any] | None
    """(field, value) where the family's code has another one."""
    refusals: tuple[str, ...]
    """Half sentences, each with a field, its value and the family."""


def plan_of(config: Mapping[str, Any], renamed: Mapping[str, str]) -> Plan:
    """`renamed` is mlx-lm's table of model types that another module serves. Raises `EngineUnavailable` where no
    family serves this model type."""
    family = family_of(config, renamed)
    said = meaning_of(config)
    whole = plain(dict(config))
    text: dict[str, Any] = whole[NESTED] if family.nested else whole
    # A few fields of the text stand beside it.
    told = {name: whole[name] for name in family.fields & whole.keys() - text.keys() if whole[name] is not None}
    if family.nested and TIED in family.fields and isinstance(whole.get(TIED), bool):
        # A model around a text model ties by its own field, whatever stands inside.
        told[TIED] = whole[TIED]
    told |= renamed_fields({**text, **told}, said, family)
    rope = said.get("rope_parameters")
    bounds: list[Bound] = []
    if isinstance(rope, dict) and main_part(rope).get("rope_theta") is not None:
        told |= rope_fields(rope, family, head_dim(said))
        if (tokens := exact_tokens(rope)) is not None:
            reason = "RoPE's short_factor holds, and a longer sequence is turned by long_factor from its first token"
            bounds.append(Bound(tokens, reason))
    changed = {name: value for name, value in {**text, **told}.items() if _differs(name, value, text, config, family)}
    overrides: dict[str, Any] = {NESTED: {**text, **changed}} if family.nested else changed
    if family.nested:
        outer = ((name, whole.get(name, said.get(name))) for name in family.outer - {NESTED})
        overrides |= {name: value for name, value in outer if value is not None and config.get(name) != value}
    refusals = [
        f"config.json has no {name}, which {family.code} needs"
        for name in sorted(family.required - {**text, **told}.keys())
    ]
    return Plan(
        family, said, overrides, tuple(bounds), asked_for(said, family), (*refusals, *unserved(text, said, family))
    )


def _differs(name: str, value: Any, text: Mapping[str, Any], config: Mapping[str, Any], family: Family) -> bool:
    before = text if family.nested else config
    return name not in before or before[name] != value
