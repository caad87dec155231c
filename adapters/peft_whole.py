"""Whole tensors in PEFT's files: `modules_to_save`, and the embeddings and heads that PEFT adds to an adapter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from adapters.peft_names import Names
from adapters.spec import TIED_HEAD, AdapterUnsupported, ModuleSpec, place_of, shown

WHOLE = re.compile(r"(?:base_model\.model\.)?(.+?)(?:\.modules_to_save(?:\.[^.]+)?|(\.base_layer))?\.([^.]+)")
"""Of a whole tensor: layer, whether it lies below a low-rank part, parameter."""
EMBEDDINGS = ("embedding", "tied_embedding")
HEADS = ("lm_head", "output", "embed_out")
"""What output layers are called; `all-linear` leaves them out."""


def unsaved(wanted: Iterable[str], saved: Iterable[str]) -> list[str]:
    return [
        f"modules_to_save names {shown(name)}, which is no module of this base."
        for name in wanted
        if not any(is_saved(path, name) for path in saved)
    ]


def is_saved(path: str, name: str) -> bool:
    """PEFT's rule: a module whose path ends with the name is saved with all it holds."""
    parts = path.split(".")
    return name != "" and any(".".join(parts[:end]).endswith(name) for end in range(1, len(parts)))


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
            wanted = path in saved or ".modules_to_save" in name or is_table
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
