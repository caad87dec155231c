"""Heads in adapter files: what scores labels in the place of the output layer, as PEFT saves it beside an adapter for
`SEQ_CLS` and `TOKEN_CLS`, and as a file of whole tensors holds it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from adapters.errors import shown
from adapters.faults import Fault
from adapters.spec import HEAD_MODULES, NO_SCORING, AdapterSpec, HeadTask, Scoring
from adapters.tensors import FileTensor

TASK_TYPES: Mapping[str, HeadTask] = {"SEQ_CLS": "classify", "TOKEN_CLS": "token_classify"}
"""PEFT's names; it writes modules_to_save = ["classifier", "score"] for both, whichever of the two there is."""
NAME = re.compile(
    rf"(?:base_model\.model\.)?({'|'.join(HEAD_MODULES)})(?:\.modules_to_save(?:\.[^.\d]+)?)?((?:\.\d+)?\.(?:weight|bias))"
)
LAYERS = ([""], ["0", "2"])
"""Numbers of the layers of a head: one layer has none, and between two of them stands a ReLU."""


@dataclass(frozen=True, slots=True)
class HeadInFile:
    """`task` is None where the file is for no head."""

    task: HeadTask | None
    tensors: Mapping[str, FileTensor]
    """By the head's own names, `score.weight`."""
    shapes: Mapping[str, tuple[int, ...]]
    """What they have to be."""
    names: frozenset[str]
    """The tensors', as the file has them."""
    faults: tuple[Fault, ...]


NO_HEAD = HeadInFile(None, {}, {}, frozenset(), ())


def head_in(tensors: Mapping[str, FileTensor], config: Mapping[str, Any], scoring: Scoring) -> HeadInFile:
    """The head that a file brings for a base. A base that generates takes one where `task_type` says what it is for."""
    asked = TASK_TYPES.get(str(config.get("task_type")))
    if scoring.whole:
        return _of_whole(asked, str(config.get("task_type")), scoring)
    found = {name: match for name in tensors if (match := NAME.fullmatch(name))}
    task = asked or (scoring.task if found else None)
    if task is None:
        return NO_HEAD
    own = {f"{match[1]}{match[2]}": tensors[name] for name, match in found.items()}
    names = frozenset(found)
    if not own and scoring.task is not None:
        return NO_HEAD
    if not own:
        reason = f"task_type is {asked and config['task_type']}, but the file has no score.weight or classifier.weight"
        return HeadInFile(task, {}, {}, names, (Fault(f"The head is missing: {reason}."),))
    as_they_are = {name: tensor.shape for name, tensor in own.items()}
    if not scoring.width:
        fault = Fault("This base has no hidden states that a head could read: no version that scores labels is served.")
        return HeadInFile(task, own, as_they_are, names, (fault,))
    shapes = _shapes(own, scoring.width)
    if shapes is None or len(own) < len(found):
        listed = shown(", ".join(sorted(names)))
        fault = Fault(
            f"The head ({listed}) is none that is known: one linear layer of one module is, or two called 0 and 2 with "
            "a ReLU between them."
        )
        return HeadInFile(task, own, as_they_are, names, (fault,))
    return HeadInFile(task, own, shapes, names, ())


def _of_whole(asked: HeadTask | None, named: str, scoring: Scoring) -> HeadInFile:
    """A version has the base's task where the base's head is parameters like its others."""
    if asked in (None, scoring.task):
        return NO_HEAD
    given = scoring.task or "vectors"
    fault = Fault(f"task_type is {named}, and this base is for {given}, of which a version changes nothing.")
    return HeadInFile(None, {}, {}, frozenset(), (fault,))


def task_type_of(
    spec: AdapterSpec, scoring: Scoring = NO_SCORING, parameters: Collection[str] = ()
) -> dict[str, str | None]:
    """The field of a configuration that says what a version is for; nothing where that is to generate. PEFT wants the
    whole head in a file for a task of labels, so that one without it is for none, and goes on any class."""
    task = spec.task
    if task is None and scoring.task is None:
        return {"task_type": "FEATURE_EXTRACTION"} if scoring.whole else {}
    own = [path for path in parameters if _in_head(path.rpartition(".")[0])]
    if task is None and scoring.whole and own and set(own).issubset(spec.dense):
        task = scoring.task
    return {"task_type": next((name for name, known in TASK_TYPES.items() if known == task), None)}


def saved_modules(spec: AdapterSpec, parameters: Collection[str]) -> set[str]:
    """Names for modules_to_save, by the `parameters` of the base: a head of several layers is saved under its own,
    since PEFT adds that, and would wrap a layer within it once more."""
    saved = {path.rpartition(".")[0] for path in spec.dense} - spec.modules.keys()
    for head in HEAD_MODULES:
        own = {path for path in parameters if path.startswith(f"{head}.")}
        if own and own.issubset(spec.dense):
            saved = {layer for layer in saved if not layer.startswith(f"{head}.")} | {head}
    return saved | (set(HEAD_MODULES) if spec.head else set())


def _in_head(layer: str) -> bool:
    """PEFT's rule: a module whose path ends with the name of a head is saved, with all that it holds."""
    return any(holder.endswith(HEAD_MODULES) for holder in accumulate(layer.split("."), "{}.{}".format))


def _shapes(own: Mapping[str, FileTensor], width: int) -> dict[str, tuple[int, ...]] | None:
    """What the tensors have to be, layer by layer; None for layers that are not known."""
    modules = {name.partition(".")[0] for name in own}
    parts = [name.partition(".")[2].rpartition(".") for name in own]
    numbers = sorted({number for number, _, _ in parts})
    if len(modules) != 1 or numbers not in LAYERS:
        return None
    (module,) = modules
    shapes: dict[str, tuple[int, ...]] = {}
    for number in numbers:
        path = f"{module}.{number}." if number else f"{module}."
        weight = own.get(f"{path}weight")
        if weight is None:
            return None
        rows = max(weight.shape[0], 1) if len(weight.shape) == 2 else 1
        shapes[f"{path}weight"] = (rows, width)
        if f"{path}bias" in own:
            shapes[f"{path}bias"] = (rows,)
        width = rows
    return shapes
