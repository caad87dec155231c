"""Whole tensors in PEFT's files: `modules_to_save`, and the embeddings and heads that PEFT adds to an adapter."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adapters.errors import AdapterUnsupported, shown
from adapters.faults import Fault
from adapters.formats.fit import stranger, twice
from adapters.formats.heads import NO_HEAD, HeadInFile, head_in
from adapters.formats.peft_names import Names
from adapters.spec import HEAD_MODULES, TIED_HEAD, ModuleSpec, Parameter, Scoring, place_of
from adapters.tensors import FileTensor

WHOLE = re.compile(r"(?:base_model\.model\.)?(.+?)(?:\.modules_to_save(?:\.[^.]+)?|(\.base_layer))?\.([^.]+)")
"""The name of a whole tensor: layer, whether it lies below a low-rank part, parameter."""
EMBEDDINGS = ("embedding", "tied_embedding")
HEADS = ("lm_head", "output", "embed_out")
"""What output layers are called; `all-linear` leaves them out."""


@dataclass(frozen=True, slots=True)
class Saved:
    """What a file holds besides low-rank parts."""

    dense: Mapping[str, FileTensor] = field(default_factory=dict)
    """Parameter path → whole tensor."""
    promised: tuple[str, ...] = ()
    """Parameter paths that modules_to_save says are among them."""
    head: HeadInFile = NO_HEAD
    strangers: tuple[Fault, ...] = ()
    """Tensors that are no part of an adapter."""
    faults: tuple[Fault, ...] = ()
    """Names of modules_to_save that are none, and tensors that are there twice."""


NOTHING_SAVED = Saved()


def saved_in(
    others: Mapping[str, FileTensor],
    wanted: Sequence[str],
    config: Mapping[str, Any],
    names: Names,
    modules: Mapping[str, ModuleSpec],
    layers: Mapping[str, tuple[int, int]],
    parameters: Mapping[str, Parameter],
    scoring: Scoring,
) -> Saved:
    """Reads the tensors of a file that are no low-rank parts; `wanted` are the names in modules_to_save, `modules` the
    layers that have low-rank parts. Raises `AdapterUnsupported`, see `_refuse_half_tied`."""
    head = head_in(others, config, scoring)
    promised, met = _saved_by(wanted, parameters)
    left = others.keys() - head.names
    whole = _whole_tensors(left, names, modules, promised, layers)
    _refuse_half_tied(whole, layers)
    dense = {path: others[name] for name, (path, _) in whole.items()}
    known_heads = head.task is not None or scoring.task is not None
    unknown = (name for name in wanted if name not in met and not (known_heads and name in HEAD_MODULES))
    repeated = (twice(name, dense[path]) for name, (path, _) in whole.items() if dense[path] is not others[name])
    strangers = tuple(stranger(name, _why_strange(name)) for name in sorted(left - whole.keys()))
    return Saved(dense, promised, head, strangers, (*_unsaved(unknown), *repeated))


def _why_strange(name: str) -> str:
    if name.endswith(".base_layer.weight"):
        return "the base's own weight of a layer that the configuration does not target"
    return "no lora_A or lora_B weight"


def _unsaved(names: Iterable[str]) -> list[Fault]:
    which = "which is no module of this base"
    return [
        Fault(
            f"modules_to_save names {shown(name)}, {which}.",
            "names in modules_to_save are no modules of this base",
            shown(name),
        )
        for name in names
    ]


def _saved_by(names: Collection[str], parameters: Iterable[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """(Those of `parameters` that are saved, those of `names` that saved one). PEFT's rule: a module whose path ends
    with a name, wherever that begins, is saved with all it holds."""
    lengths = {len(name) for name in names} - {0}
    saved: dict[str, None] = {}
    met: set[str] = set()
    wanted = frozenset(names)
    for path in parameters if lengths else ():
        holders = [path[:at] for at, character in enumerate(path) if character == "."]
        found = {end for holder in holders for length in lengths if (end := holder[-length:]) in wanted}
        met |= found
        saved |= dict.fromkeys([path] if found else [])
    return tuple(saved), frozenset(met)


def _whole_tensors(
    tensors: Iterable[str],
    names: Names,
    modules: Mapping[str, ModuleSpec],
    saved: Iterable[str],
    layers: Mapping[str, tuple[int, int]],
) -> dict[str, tuple[str, bool]]:
    """The file's name → (parameter path, whether it lies below a low-rank part) of whole tensors: of modules_to_save,
    and the embeddings and heads that PEFT adds to a file."""
    found: dict[str, tuple[str, bool]] = {}
    kept = frozenset(saved)
    for name in sorted(tensors):
        match = WHOLE.fullmatch(name)
        if match is None:
            continue
        module, below, parameter = match.groups()
        module = names.base.get(module, module)
        path = f"{module}.{parameter}"
        if below:
            wanted = module in modules
        else:
            is_table = module in layers and (place_of(layers[module]) in (*EMBEDDINGS, "tied_head") or is_head(module))
            wanted = path in kept or ".modules_to_save" in name or is_table
        if wanted:
            found[name] = path, bool(below)
    return found


def _refuse_half_tied(whole: Mapping[str, tuple[str, bool]], layers: Mapping[str, tuple[int, int]]) -> None:
    """Raises `AdapterUnsupported` where only the file's author knows whether the head follows the embedding."""
    table = next((f"{path}.weight" for path, shape in layers.items() if place_of(shape) == "tied_embedding"), None)
    paths = {path for path, _ in whole.values()}
    if (table, False) in whole.values() and f"{TIED_HEAD}.weight" not in paths:
        raise AdapterUnsupported(
            {
                "modules_to_save": f"The file holds {table} but not {TIED_HEAD}.weight, which shares it in this base: "
                "put both into modules_to_save, or send them as kind full."
            }
        )


def is_head(path: str) -> bool:
    parts = path.split(".")
    return parts[-1] in HEADS and not any(part.isdigit() for part in parts)
