"""Whole tensors in PEFT's files: `modules_to_save`, and the embeddings and heads that PEFT adds to an adapter."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from adapters.errors import AdapterUnsupported, shown
from adapters.faults import Fault
from adapters.formats.peft_names import Names
from adapters.spec import TIED_HEAD, ModuleSpec, place_of

WHOLE = re.compile(r"(?:base_model\.model\.)?(.+?)(?:\.modules_to_save(?:\.[^.]+)?|(\.base_layer))?\.([^.]+)")
"""The name of a whole tensor: layer, whether it lies below a low-rank part, parameter."""
EMBEDDINGS = ("embedding", "tied_embedding")
HEADS = ("lm_head", "output", "embed_out")
"""What output layers are called; `all-linear` leaves them out."""


def unsaved(names: Iterable[str]) -> list[Fault]:
    which = "which is no module of this base"
    return [
        Fault(
            f"modules_to_save names {shown(name)}, {which}.",
            "names in modules_to_save are no modules of this base",
            shown(name),
        )
        for name in names
    ]


def saved_by(names: Collection[str], parameters: Iterable[str]) -> tuple[tuple[str, ...], frozenset[str]]:
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


def whole_tensors(
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


def refuse_half_tied(whole: Mapping[str, tuple[str, bool]], layers: Mapping[str, tuple[int, int]]) -> None:
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
