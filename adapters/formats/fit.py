"""Checks that an adapter fits a base: strictly in both directions, and with every fault at once.

A format reader makes a `Proposal` of a file: what the configuration promises, and the tensors under the base's own
names. `faults` compares it with the base's layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from adapters.errors import shown
from adapters.faults import Fault
from adapters.formats.heads import NO_HEAD, HeadInFile
from adapters.spec import DENSE_KINDS, MAGNITUDE, AdapterSpec, Parameter, Place, ends, experts_of, quoted
from adapters.tensors import STORAGE, FileTensor

PEFT_PREFIX = "base_model.model."
TRANSPOSED = ("it looks transposed", "they look transposed")
"""The words for one tensor, and for several."""
TOWER = re.compile(r"(?:^|\.)(?:visual|vision_tower|vision_model|multi_modal_projector|connector)\.")
"""What the layers of a vision model's tower are called, and of what leads from it into the decoder."""
ON_TOWER = (
    "adapters on a vision tower are not served, since what it makes of a picture would be another thing under each "
    "version: train the layers of the language model alone"
)
NOT_REPLACED = (
    "none of this base's parameters can be replaced: whole tensors are not served by several ranks, each of which has "
    "a part of them; push LoRA or DoRA, or serve without --tensor-parallel"
)


@dataclass(frozen=True, slots=True)
class Proposal:
    """An adapter as a file tells it, in the file's layout, not yet checked against the base."""

    spec: AdapterSpec
    """Every layer of the base that the configuration targets."""
    targets: Callable[[], str]
    """Says how the configuration names its targets, for the sentence that they match nothing."""
    tensors: Mapping[tuple[str, str], FileTensor]
    """(module path, `lora_A`, `lora_B` or `lora_magnitude_vector`) → tensor."""
    strangers: tuple[Fault, ...]
    """Faults met while reading: tensors that are no part of an adapter, or that are there twice."""
    transposed: bool
    """True where the file stores A as [in, rank] and B as [rank, out]; stacks of experts are never turned."""
    spell: Callable[[str, Place], str]
    """What the file calls a part of a layer at such a place: the end of its tensor's name."""
    dense: Mapping[str, FileTensor] = field(default_factory=dict)
    """Parameter path → whole tensor."""
    promised: tuple[str, ...] = ()
    """Parameter paths that the configuration says are among them."""
    promises: str = ""
    """How the configuration says that."""
    head: HeadInFile = NO_HEAD


def faults(
    proposal: Proposal, layers: Mapping[str, tuple[int, int]], parameters: Mapping[str, Parameter]
) -> list[Fault]:
    """Every fault, in a fixed order; empty if the adapter fits `layers` (path → (out, in)) and `parameters`."""
    found = list(proposal.strangers)
    prefixed = {module: prefix for module, _ in proposal.tensors if (prefix := _prefix(module, layers))}
    found += [
        Fault(f"{path} is missing: {proposal.promises}.", f"tensors are missing ({proposal.promises})", path)
        for path in proposal.promised
        if path not in proposal.dense
    ]
    for path, tensor in sorted(proposal.dense.items()):
        found += _wrong_dense(path, tensor, parameters)
    found += proposal.head.faults
    for path, tensor in sorted(proposal.head.tensors.items()):
        found += _wrong_values(tensor, proposal.head.shapes[path], "", "")
    if not proposal.spec.modules and proposal.spec.kind not in DENSE_KINDS:
        known = sorted({path.rsplit(".", 1)[-1] for path in layers})
        text = (
            f"The configuration targets {shown(proposal.targets())}, which is no layer of this base; "
            f"layers that can be adapted are called {shown(', '.join(known))}."
        )
        found.append(Fault(text, misfit=True))
    there = {module.removeprefix(prefix) for module, prefix in prefixed.items()}
    found += (fault for module, fault in _missing(proposal) if module not in there)
    for (module, part), tensor in sorted(proposal.tensors.items()):
        if module in prefixed:
            found.append(_prefixed(tensor, module, prefixed[module]))
        elif module not in layers and TOWER.search(module):
            found.append(_unexpected(tensor, ON_TOWER, ON_TOWER))
        elif module not in layers:
            why = f"the base has no adaptable layer {shown(module)}"
            found.append(_unexpected(tensor, why, "the base has no such layers", misfit=True))
        elif module not in proposal.spec.modules:
            why = "the configuration does not target"
            found.append(_unexpected(tensor, f"{why} {shown(module)}", f"{why} their layers"))
        elif part not in proposal.spec.parts:
            why = "the configuration does not say that this is DoRA"
            found.append(_unexpected(tensor, why, why))
        else:
            found += _wrong(proposal, module, part, tensor, layers[module])
    return found


def _prefix(module: str, layers: Mapping[str, object]) -> str | None:
    """What stands in front of a layer's path, if the path is one with something in front of it."""
    if module in layers:
        return None
    return next((module[: -len(end)] for end in ends(module) if end and end in layers), None)


def _prefixed(tensor: FileTensor, path: str, prefix: str) -> Fault:
    # PEFT's own prefix, where that stands behind the other, is no fault.
    name, front = shown(tensor.name), quoted(prefix.removesuffix(PEFT_PREFIX) or prefix)
    return Fault(
        f"{name} has the prefix {front} in front of {shown(path.removeprefix(prefix))}: send it without.",
        f"tensors have the prefix {front} in front of what this base calls its own",
        name,
        "Send them without this prefix.",
    )


def _unexpected(tensor: FileTensor, why: str, all_because: str, *, misfit: bool = False) -> Fault:
    name = shown(tensor.name)
    kind = f"tensors are unexpected, since {all_because}"
    return Fault(f"{name} is unexpected: {why}.", kind, name, misfit=misfit)


def _missing(proposal: Proposal) -> Iterator[tuple[str, Fault]]:
    """Layers and what is missing of them."""
    for module, spec in proposal.spec.modules.items():
        present = [part for part in proposal.spec.parts if (module, part) in proposal.tensors]
        if not present:
            why = "targeted by the configuration, but the file has no tensors for"
            yield module, Fault(f"{module} is {why} it.", f"layers are {why} them", module)
            continue
        if len(present) == len(proposal.spec.parts):
            continue
        there = " and ".join(f"{module}.{proposal.spell(part, spec.place)}" for part in present)
        for part in proposal.spec.parts:
            if part not in present:
                name = f"{module}.{proposal.spell(part, spec.place)}"
                yield (
                    module,
                    Fault(
                        f"{name} is missing: the file has only {there}.",
                        "tensors are missing of layers for which the file has others",
                        name,
                    ),
                )


def _wrong(proposal: Proposal, module: str, part: str, tensor: FileTensor, layer: tuple[int, int]) -> Iterator[Fault]:
    rank = proposal.spec.modules[module].rank
    out, width = layer
    expected: tuple[int, ...] = (out,) if part == MAGNITUDE else (rank, width) if part == "lora_A" else (out, rank)
    if experts_of(layer):
        expected = experts_of(layer) + expected
    elif proposal.transposed:
        expected = expected[::-1]
    why = _why(tensor, expected, rank) if tensor.shape != expected else ("", "")
    yield from _wrong_values(tensor, expected, *why)


def _wrong_dense(path: str, tensor: FileTensor, parameters: Mapping[str, Parameter]) -> Iterator[Fault]:
    if not parameters:
        yield _unexpected(tensor, NOT_REPLACED, NOT_REPLACED)
        return
    parameter = parameters.get(path)
    if parameter is None:
        prefix = _prefix(path, parameters)
        if prefix:
            yield _prefixed(tensor, path, prefix)
        else:
            why = f"the base has no parameter {shown(path)}"
            yield _unexpected(tensor, why, "the base has no such parameters", misfit=True)
        return
    turned = tensor.shape == parameter.shape[::-1]
    yield from _wrong_values(tensor, parameter.shape, *(TRANSPOSED if turned else ("", "")))


def _wrong_values(tensor: FileTensor, expected: tuple[int, ...], why: str, all_because: str) -> Iterator[Fault]:
    if tensor.dtype not in STORAGE:
        yield unserved(tensor)
    if tensor.shape != expected:
        name, what = shown(tensor.name), f"has shape {_shape(tensor.shape)} but must be {_shape(expected)}"
        yield Fault(
            f"{name} {what}{f': {why}' if why else ''}.",
            f"tensors have shapes that do not fit{f' ({all_because})' if all_because else ''}",
            f"{name} {what}",
            misfit=not why,
        )
    elif tensor.readable and not tensor.finite():
        name, what = shown(tensor.name), "values that are not finite (NaN or infinity)"
        yield Fault(f"{name} holds {what}.", f"tensors hold {what}", name)


def unserved(tensor: FileTensor) -> Fault:
    """The fault of a tensor in a dtype that no adapter is served in."""
    what = f"dtype {tensor.dtype}; {', '.join(STORAGE)} are served"
    name = shown(tensor.name)
    remedy = "Cast them to float32."
    if not tensor.dtype.startswith("F"):
        remedy = "Send the values that they stand for as float32."
    return Fault(f"{name} has {what}.", f"tensors have {what}", name, remedy)


def twice(name: str, other: FileTensor) -> Fault:
    """A tensor that is there under another name already."""
    text = f"{shown(name)} is there twice: also as {shown(other.name)}"
    return Fault(f"{text}.", "tensors are there twice", shown(name))


def stranger(name: str, why: str) -> Fault:
    """A tensor that is no part of an adapter."""
    return Fault(
        f"{shown(name)} is unexpected: it is {why}.", f"tensors are unexpected, since each is {why}", shown(name)
    )


def _why(tensor: FileTensor, expected: tuple[int, ...], rank: int) -> tuple[str, str]:
    """Why a shape is wrong, in the words for one tensor and for several."""
    if len(expected) == 1:
        return ("one number for each output",) * 2
    if len(expected) == 3:
        return ("one matrix for each expert",) * 2 if tensor.shape[:-2] != expected[:-2] else ("", "")
    if len(tensor.shape) == 2 and tensor.shape == expected[::-1]:
        return TRANSPOSED
    at = expected.index(rank)
    if len(tensor.shape) == 2 and tensor.shape[1 - at] == expected[1 - at]:
        return f"the configuration says rank {rank}", "the configuration says another rank"
    return "", ""


def _shape(shape: tuple[int, ...]) -> str:
    return shown("[" + ", ".join(map(str, shape)) + "]")
