"""What config.json means: its fields as transformers' own class for the family settles them, which is what a trainer
computes with. Releases of transformers move and rename fields, and let one win over another; here they are in one
place, RoPE always in `rope_parameters`."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig

log = logging.getLogger(__name__)

NESTED = "text_config"
UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, IndexError, StrictDataclassError)
"""What a configuration class raises for values that it does not expect."""
PART = "partial_rotary_factor"
SCALED = frozenset({"llama3", "yarn", "longrope"})


@dataclass(frozen=True, slots=True)
class Meaning:
    """The part of config.json that describes the text model."""

    fields: dict[str, Any]
    """With the defaults that transformers has for fields that the file leaves out."""
    names: dict[str, str]
    """Other names that transformers has for some of them → the field's own."""
    declared: frozenset[str]
    """What transformers has a meaning for in this family; empty if it does not know the family, and the fields are the
    file's own."""

    @property
    def known(self) -> bool:
        return bool(self.declared)

    def get(self, name: str) -> Any:
        """A field's value under this or another name; None if there is none."""
        found = self.fields.get(name)
        return self.fields.get(self.names.get(name, "")) if found is None else found


def meaning_of(config: Mapping[str, Any]) -> Meaning:
    """The meaning of a whole config.json."""
    raw = plain(copy.deepcopy(dict(config)))
    kind = raw.get("model_type")
    if kind in CONFIG_MAPPING:
        try:
            with _quiet():
                settled = _settled(CONFIG_MAPPING[kind], raw)
                fields = plain(settled.to_dict())
        except UNREADABLE as error:
            log.warning("transformers does not read this config.json (%s): its fields are taken as they are.", error)
        else:
            names = settled.attribute_map
            declared = {*(field.name for field in dataclasses.fields(settled)), *names}
            rope = _rope_of(fields) if _turns_parts(type(settled)) else _whole(_rope_of(fields))
            return Meaning(fields | {"rope_parameters": rope}, dict(names), frozenset(declared))
    text = raw.get(NESTED)
    fields = text if isinstance(text, dict) else raw
    return Meaning(fields | {"rope_parameters": standard_rope(fields)}, {}, frozenset())


def plain(value: Any) -> Any:
    """Without the objects in which transformers writes what JSON has no numbers for."""
    match value:
        case {"__float__": str(text)} if len(value) == 1:
            return float(text.replace("Infinity", "inf"))
        case dict():
            return {name: plain(inner) for name, inner in value.items()}
        case list() | tuple():
            return [plain(inner) for inner in value]
    return value


def standard_rope(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """`rope_parameters` of fields that no class of transformers has seen, by its rules: what the nested field says
    comes before the flat ones, and the older `rope_scaling` before `rope_parameters`."""
    nested = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    if not isinstance(nested, dict):
        return None
    flat = {name: fields[name] for name in ("rope_theta", PART) if fields.get(name) is not None}
    if not nested and not flat:
        return None
    kinds = {name: entry for name, entry in nested.items() if isinstance(entry, dict)}
    if kinds:
        return {name: _typed({**flat, **entry}, fields) for name, entry in kinds.items()}
    return _typed({**flat, **nested}, fields)


def _typed(rope: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    original = fields.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    if kind in SCALED and (original := original or fields.get("max_position_embeddings")):
        rope["original_max_position_embeddings"] = original
    return {**rope, "rope_type": kind}


def _settled(maker: type[PreTrainedConfig], raw: dict[str, Any]) -> PreTrainedConfig:
    parts = getattr(maker, "sub_configs", None) or {}
    if NESTED in parts and NESTED not in raw:
        # A text model cut out of a larger one: the file is what the nested part would be.
        own = parts[NESTED]
        found = maker.from_dict(raw).get_text_config() if own.model_type == "" else own.from_dict(raw)
    else:
        found = maker.from_dict(raw).get_text_config()
    return found


def _turns_parts(settled: type[PreTrainedConfig]) -> bool:
    """Returns whether the model beside this configuration looks at which part of a head is turned. Its source is read,
    and not imported, as it needs torch."""
    found = find_spec(settled.__module__.replace(".configuration_", ".modeling_"))
    path = Path(found.origin) if found is not None and found.origin else None
    return path is None or not path.is_file() or PART in path.read_text("utf-8")


def _whole(rope: dict[str, Any] | None) -> dict[str, Any] | None:
    """Without the part of a head that is turned: most classes of transformers turn all of it, whatever is said."""
    if rope is None:
        return None
    return {name: _whole(value) if isinstance(value, dict) else value for name, value in rope.items() if name != PART}


def _rope_of(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    rope = fields.get("rope_parameters")
    return rope if isinstance(rope, dict) and rope else standard_rope(fields)


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers warns of fields that it does not know; what this server does not know, it says itself."""
    noisy = logging.getLogger("transformers")
    before = noisy.level
    noisy.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        noisy.setLevel(before)
