"""The file format of mlx-lm: adapter_config.json with `lora_parameters`, tensors `<path>.lora_a` and `<path>.lora_b`.

A is stored as [in, rank] and B as [rank, out], but of stacked experts as [experts, rank, in] and [experts, out, rank];
DoRA's magnitudes [out] as `<path>.m`. Which layers are targets is what
`mlx_lm.tuner.utils` makes of the configuration. Its other fields describe the training and change nothing here.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adapters.errors import AdapterUnreadable, AdapterUnsupported, shown
from adapters.faults import Fault
from adapters.formats.fit import Proposal, stranger
from adapters.spec import (
    MAGNITUDE,
    MAX_RANK,
    SHOWN_FIELDS,
    TIED_HEAD,
    AdapterSpec,
    Kind,
    ModuleSpec,
    place_of,
    quoted,
    to_float32,
)
from adapters.tensors import AdapterTensor, FileTensor, write_safetensors

if TYPE_CHECKING:
    from adapters.bundle import AdapterBundle

BLOCK = re.compile(r"(.*?)\.?\b(\d+)\.(.+)")
"""`model.layers.3.self_attn.q_proj` → what holds the blocks, the block's number, the name within the block."""
LORA_PARAMETERS = frozenset({"rank", "scale", "dropout", "keys"})
KINDS = ("lora", "dora")
DORA_EXPERTS = "DoRA on stacked experts does not exist in mlx-lm: leave them out of lora_parameters.keys."
DORA_EMBEDDING = (
    "DoRA on embeddings is not served in mlx-lm's form, which has a magnitude for every token: leave the embedding out "
    "of lora_parameters.keys."
)
NAMES = {"lora_A": "lora_a", "lora_B": "lora_b", MAGNITUDE: "m"}
PARTS = {name: part for part, name in NAMES.items()}


def read(
    tensors: Mapping[str, FileTensor], config: Mapping[str, Any], layers: Mapping[str, tuple[int, int]]
) -> Proposal:
    """What the file says about the layers of a base (path → (out, in)). Raises `AdapterUnreadable` where the
    configuration is not usable and `AdapterUnsupported` with everything in it that is not served."""
    refuse(config)
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, Mapping):
        raise AdapterUnreadable(
            "lora_parameters is missing from the adapter configuration: it holds rank and scale.",
            field="config.lora_parameters",
        )
    rank, scale = _rank(parameters.get("rank")), _scale(parameters)
    targets = _targets(_count(config.get("num_layers")), _keys(parameters.get("keys")), layers)
    modules = {path: ModuleSpec(rank, scale, place_of(layers[path])) for path in targets}
    parts, strangers = _parts(tensors)
    kind: Kind = "dora" if config.get("fine_tune_type") == "dora" else "lora"
    places = {module.place for module in modules.values()} if kind == "dora" else set()
    if "experts" in places:
        raise AdapterUnsupported({"fine_tune_type": DORA_EXPERTS})
    if places - {"linear"}:
        raise AdapterUnsupported({"fine_tune_type": DORA_EMBEDDING})
    return Proposal(
        spec=AdapterSpec(kind, modules),
        targets=lambda: f"keys = {quoted(parameters.get('keys'))} in the last {config['num_layers']} layers",
        tensors=parts,
        strangers=tuple(strangers),
        transposed=True,
        spell=lambda part, _: NAMES[part],
    )


def complete(spec: AdapterSpec, tensors: dict[str, AdapterTensor]) -> tuple[AdapterSpec, dict[str, AdapterTensor]]:
    """mlx-lm adapts a head that shares the embedding's weight together with it: ΔW of the head is that of the table."""
    modules, tensors = dict(spec.modules), dict(tensors)
    for path, module in spec.modules.items():
        if module.place == "tied_embedding":
            modules[TIED_HEAD] = replace(module, place="tied_head")
            tensors |= _tied(tensors, path)
    return AdapterSpec(spec.kind, modules), tensors


def _tied(tensors: Mapping[str, AdapterTensor], path: str) -> dict[str, AdapterTensor]:
    """The head's halves, given the embedding's."""
    halves = {f"{TIED_HEAD}.lora_A": f"{path}.lora_B", f"{TIED_HEAD}.lora_B": f"{path}.lora_A"}
    return {mine: tensors[other].transposed() for mine, other in halves.items()}


def refuse(config: Mapping[str, Any]) -> None:
    """Raises `AdapterUnsupported` for what would change the numbers and is not served. Not for `full`, see `dense`."""
    refusals: dict[str, str] = {}
    kind = config.get("fine_tune_type", "lora")
    if kind not in KINDS:
        refusals["fine_tune_type"] = f"fine_tune_type {quoted(kind)} is not known: send lora, dora or full."
    if config.get("use_dora") and kind != "dora":
        refusals["use_dora"] = "use_dora is a field of PEFT, which mlx-lm does not read: send fine_tune_type dora."
    parameters = config.get("lora_parameters")
    if isinstance(parameters, Mapping) and (unknown := sorted(set(parameters) - LORA_PARAMETERS)):
        are = "is not read by mlx-lm, so it" if len(unknown) == 1 else "are not read by mlx-lm, so they"
        names = ", ".join(f"lora_parameters.{shown(field)}" for field in unknown[:SHOWN_FIELDS])
        left = f" and {len(unknown) - SHOWN_FIELDS} more" if len(unknown) > SHOWN_FIELDS else ""
        reason = f"{names}{left} {are} cannot be meant: rank, scale, dropout and keys are."
        refusals |= {f"lora_parameters.{shown(field)}": reason for field in unknown}
    if refusals:
        raise AdapterUnsupported(refusals)


def _targets(count: int, keys: frozenset[str] | None, layers: Mapping[str, tuple[int, int]]) -> list[str]:
    """mlx-lm's rule: keys name layers within the last `count` blocks (0 and below: all) or from the model's root;
    without keys, every layer of those blocks."""
    blocks: dict[str, tuple[int, str]] = {}
    holder = Counter(match[1] for path in layers if (match := BLOCK.fullmatch(path))).most_common(1)
    for path in layers:
        match = BLOCK.fullmatch(path)
        if match and match[1] == holder[0][0]:
            blocks[path] = int(match[2]), match[3]
    own = [path for path in layers if place_of(layers[path]) != "tied_head"]  # Which no model of mlx-lm has.
    number = max((index for index, _ in blocks.values()), default=-1) + 1
    first = number - count if 0 < count < number else 0
    inside = [path for path, (index, name) in blocks.items() if index >= first and (keys is None or name in keys)]
    return inside + [path for path in own if path in (keys or ())]


def _parts(tensors: Mapping[str, FileTensor]) -> tuple[dict[tuple[str, str], FileTensor], list[Fault]]:
    """(Tensors by module and part, faults)."""
    parts: dict[tuple[str, str], FileTensor] = {}
    strangers: list[Fault] = []
    for name, tensor in sorted(tensors.items()):
        module, _, part = name.rpartition(".")
        if module and part in PARTS:
            parts[module, PARTS[part]] = tensor
        else:
            strangers.append(stranger(name, "no lora_a or lora_b"))
    return parts, strangers


def _rank(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
        raise AdapterUnreadable(
            f"lora_parameters.rank must be a rank from 1 to {MAX_RANK}, not {quoted(value)}.",
            field="config.lora_parameters.rank",
        )
    return value


def _scale(parameters: Mapping[str, Any]) -> float:
    value = parameters.get("scale")
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e30:
        raise AdapterUnreadable(
            f"lora_parameters.scale must be a number, not {quoted(value)}: it is what multiplies B · A.",
            field="config.lora_parameters.scale",
        )
    return to_float32(float(value))


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise AdapterUnreadable(
            f"num_layers must be a whole number in the adapter configuration, not {quoted(value)}: it says how many "
            "of the last blocks are adapted, -1 for all.",
            field="config.num_layers",
        )
    return value


def _keys(value: object) -> frozenset[str] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple | set) or not all(isinstance(key, str) for key in value):
        raise AdapterUnreadable(
            f"lora_parameters.keys must be a list of layer names, not {quoted(value)}.",
            field="config.lora_parameters.keys",
        )
    return frozenset(value)


def write(bundle: AdapterBundle) -> tuple[bytes, dict[str, Any]]:
    """(adapters.safetensors, adapter_config.json) that mlx-lm loads, and that read back to the same digest.

    Raises `AdapterUnsupported` for what this format cannot say, as layers that differ in rank or scale."""
    reason = _unsayable(bundle)
    if reason is not None:
        raise AdapterUnsupported({"format": reason})
    module = next(iter(bundle.spec.modules.values()))
    own = {path: module for path, module in bundle.spec.modules.items() if module.place != "tied_head"}
    config = {
        "fine_tune_type": bundle.spec.kind,
        "num_layers": -1,
        "lora_parameters": {
            "rank": module.rank,
            "scale": module.scale,
            "dropout": 0.0,
            "keys": list(own),
        },
    }
    tensors: dict[str, AdapterTensor] = {}
    for name, tensor in bundle.tensors.items():
        path, _, part = name.rpartition(".")
        if path in own:
            turned = own[path].place != "experts"
            tensors[f"{path}.{NAMES[part]}"] = tensor.transposed() if turned else tensor
    return write_safetensors(tensors, {"format": "mlx", "adapter_config": json.dumps(config)}), config


def _unsayable(bundle: AdapterBundle) -> str | None:
    modules = bundle.spec.modules
    if bundle.spec.head:
        return "mlx-lm has no heads that score labels, and this adapter has one: use peft."
    if bundle.spec.dense:
        return "An mlx-lm adapter has no whole tensors beside low-rank ones, and this one does: use peft."
    if len({(module.rank, module.scale) for module in modules.values()}) != 1:
        return "An mlx-lm file has one rank and one scale for all layers, and this adapter has several: use peft."
    places = {module.place: path for path, module in modules.items()}
    if bundle.spec.kind == "dora" and places.keys() != {"linear"}:
        return "mlx-lm's DoRA on embeddings is another than this adapter's: use peft."
    if "tied_embedding" in places or "tied_head" in places:
        both = {"tied_embedding", "tied_head"} <= places.keys()
        tied = _tied(bundle.tensors, places["tied_embedding"]) if both else {}
        if not both or any(
            (bundle.tensors[name].dtype, bundle.tensors[name].array.tobytes()) != (half.dtype, half.array.tobytes())
            for name, half in tied.items()
        ):
            return (
                "mlx-lm adapts an embedding and the head that shares its weight together, and this adapter does not: "
                "use peft."
            )
    return None
