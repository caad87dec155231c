"""Files of whole tensors under the base's own parameter names: what is added to them (`{"kind": "delta"}`), or what
takes their place (`{"kind": "full"}`, and mlx-lm's `fine_tune_type: full`)."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from adapters.fit import Proposal
from adapters.spec import DENSE_KINDS, AdapterSpec, AdapterUnreadable, AdapterUnsupported, Kind, Parameter, shown
from adapters.tensors import AdapterTensor, FileTensor, write_safetensors

if TYPE_CHECKING:
    from adapters.bundle import AdapterBundle

PREFIX = "base_model.model."
"""What PEFT puts in front of the base's names."""
WITHOUT_EFFECT = frozenset({"base_model_name_or_path", "revision", "task_type"})
BLOCK = re.compile(r"(.*?)\.?\b(\d+)\.(.+)")


def is_dense(config: Mapping[str, Any]) -> bool:
    return config.get("kind") in DENSE_KINDS or config.get("fine_tune_type") == "full"


def read(tensors: Mapping[str, FileTensor], config: Mapping[str, Any], parameters: Mapping[str, Parameter]) -> Proposal:
    """Raises `AdapterUnsupported` for fields that would mean something else, `AdapterUnreadable` for wrong values."""
    by_mlx = "fine_tune_type" in config
    _refuse_twofold(config)
    if not by_mlx:
        _refuse(config)
    dense: dict[str, FileTensor] = {}
    strangers: list[str] = []
    for name, tensor in sorted(tensors.items()):
        path = name.removeprefix(PREFIX)
        if path in dense:
            strangers.append(f"{shown(name)} is there twice: also as {shown(dense[path].name)}.")
        dense[path] = tensor
    kind: Kind = "delta" if config.get("kind") == "delta" else "full"
    return Proposal(
        spec=AdapterSpec(kind, {}, tuple(dense)),
        targets="",
        tensors={},
        strangers=tuple(strangers),
        transposed=False,
        spell=lambda part, _: part,
        dense=dense,
        promised=_promised(_count(config.get("num_layers")), parameters) if by_mlx else (),
        promises=f"num_layers = {shown(config.get('num_layers'))} says that it was trained",
    )


def complete(spec: AdapterSpec, tensors: dict[str, AdapterTensor]) -> tuple[AdapterSpec, dict[str, AdapterTensor]]:
    """The file says everything."""
    return spec, tensors


def _refuse_twofold(config: Mapping[str, Any]) -> None:
    """Fields that say something else than that these are whole tensors."""
    wrong = {
        field: f"{field} = {shown(config[field])} contradicts whole tensors: leave it out, or send a low-rank adapter."
        for field in ("peft_type", "r", "lora_alpha", "target_modules")
        if config.get(field) not in (None, [], "")
    }
    if config.get("fine_tune_type", "full") != "full":
        said = shown(config["fine_tune_type"])
        wrong["fine_tune_type"] = f"fine_tune_type = {said} contradicts kind {config['kind']}: leave one of them out."
    elif "fine_tune_type" in config and config.get("kind", "full") != "full":
        wrong["kind"] = f"kind {shown(config['kind'])} contradicts fine_tune_type = full: leave one of them out."
    if wrong:
        raise AdapterUnsupported(wrong)


def _refuse(config: Mapping[str, Any]) -> None:
    wrong = {
        shown(field): f"{shown(field)} = {shown(value)} means nothing beside kind {config['kind']}: leave it out."
        for field, value in config.items()
        if field != "kind" and field not in WITHOUT_EFFECT and value not in (None, False, "", [], {})
    }
    if wrong:
        raise AdapterUnsupported(wrong)


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise AdapterUnreadable(
            f"num_layers must be a whole number in the adapter configuration, not {shown(value)}: it says how many "
            "of the last blocks were trained, -1 for all.",
            field="config.num_layers",
        )
    return value


def _promised(count: int, parameters: Mapping[str, Parameter]) -> tuple[str, ...]:
    """mlx-lm's rule: all that is not quantised in the last `count` blocks (0 and below: all) was trained and saved."""
    return tuple(p for p in _in_last_blocks(count, parameters) if not parameters[p].quantised)


def _in_last_blocks(count: int, paths: Iterable[str]) -> list[str]:
    blocks = {path: match for path in paths if (match := BLOCK.fullmatch(path))}
    holder = Counter(match[1] for match in blocks.values()).most_common(1)
    inside = {path: int(match[2]) for path, match in blocks.items() if match[1] == holder[0][0]}
    number = max(inside.values(), default=-1) + 1
    first = number - count if 0 < count < number else 0
    return [path for path, index in inside.items() if index >= first]


def write(bundle: AdapterBundle) -> tuple[bytes, dict[str, Any]]:
    """(safetensors file, its configuration) that read back to the same digest.

    Raises `AdapterUnsupported` for a bundle with low-rank parts."""
    if bundle.spec.kind not in DENSE_KINDS:
        raise AdapterUnsupported({"format": "A low-rank adapter is exported as peft or mlx."})
    config = {"kind": bundle.spec.kind}
    return write_safetensors(bundle.tensors, {"format": "mlx", "adapter_config": json.dumps(config)}), config
