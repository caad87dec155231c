"""Does an adapter fit a base? Strict both ways, and every fault at once.

A format reader makes a `Proposal` of a file: what the configuration promises, and the tensors under the base's own
names. `faults` compares it with the base's layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from adapters.spec import DENSE_KINDS, MAGNITUDE, AdapterSpec, Parameter, Place, experts_of, shown
from adapters.tensors import STORAGE, FileTensor

if TYPE_CHECKING:
    import mlx.nn as nn


@dataclass(frozen=True, slots=True)
class Proposal:
    """An adapter as a file tells it, in the file's layout, not yet checked against the base."""

    spec: AdapterSpec
    """Every layer of the base that the configuration targets."""
    targets: str
    """How the configuration names its targets, for the sentence that says they match nothing."""
    tensors: Mapping[tuple[str, str], FileTensor]
    """(module path, `lora_A`, `lora_B` or `lora_magnitude_vector`) → tensor."""
    strangers: tuple[str, ...]
    """Faults met while reading: tensors that are no part of an adapter, or that are there twice."""
    transposed: bool
    """True where the file stores A as [in, rank] and B as [rank, out]; stacks of experts are never turned."""
    spell: Callable[[str, Place], str]
    """What the file calls a part of a layer at such a place: the end of its tensor's name."""
    dense: Mapping[str, FileTensor] = field(default_factory=dict)
    """Parameter path → whole tensor."""
    promised: tuple[str, ...] = ()
    """Parameter paths that the configuration says are among them,"""
    promises: str = ""
    """and how it says so."""


def faults(proposal: Proposal, layers: Mapping[str, tuple[int, int]], parameters: Mapping[str, Parameter]) -> list[str]:
    """One sentence for each fault, in a fixed order; empty if the adapter fits `layers` (path → (out, in)) and
    `parameters`."""
    found = list(proposal.strangers)
    found += [f"{path} is missing: {proposal.promises}." for path in proposal.promised if path not in proposal.dense]
    for path, tensor in sorted(proposal.dense.items()):
        found += _wrong_dense(path, tensor, parameters)
    if not proposal.spec.modules and proposal.spec.kind not in DENSE_KINDS:
        known = sorted({path.rsplit(".", 1)[-1] for path in layers})
        found.append(
            f"The configuration targets {shown(proposal.targets)}, which is no layer of this base; "
            f"layers that can be adapted are called {shown(', '.join(known))}."
        )
    found += _missing(proposal)
    for (module, part), tensor in sorted(proposal.tensors.items()):
        if module not in layers:
            found.append(f"{shown(tensor.name)} is unexpected: the base has no adaptable layer {shown(module)}.")
        elif module not in proposal.spec.modules:
            found.append(f"{shown(tensor.name)} is unexpected: the configuration does not target {shown(module)}.")
        elif part not in proposal.spec.parts:
            found.append(f"{shown(tensor.name)} is unexpected: the configuration does not say that this is DoRA.")
        else:
            found += _wrong(proposal, module, part, tensor, layers[module])
    return found


def _missing(proposal: Proposal) -> Iterator[str]:
    for module, spec in proposal.spec.modules.items():
        present = [part for part in proposal.spec.parts if (module, part) in proposal.tensors]
        if not present:
            yield f"{module} is targeted by the configuration, but the file has no tensors for it."
            continue
        there = " and ".join(f"{module}.{proposal.spell(part, spec.place)}" for part in present)
        for part in proposal.spec.parts:
            if part not in present:
                yield f"{module}.{proposal.spell(part, spec.place)} is missing: the file has only {there}."


def _wrong(proposal: Proposal, module: str, part: str, tensor: FileTensor, layer: tuple[int, int]) -> Iterator[str]:
    name = shown(tensor.name)
    if tensor.dtype not in STORAGE:
        yield f"{name} has dtype {tensor.dtype}; {', '.join(STORAGE)} are served."
    rank = proposal.spec.modules[module].rank
    out, width = layer
    expected: tuple[int, ...] = (out,) if part == MAGNITUDE else (rank, width) if part == "lora_A" else (out, rank)
    if experts_of(layer):
        expected = experts_of(layer) + expected
    elif proposal.transposed:
        expected = expected[::-1]
    if tensor.shape != expected:
        yield f"{name} has shape {_shape(tensor.shape)} but must be {_shape(expected)}{_why(tensor, expected, rank)}."
    elif tensor.readable and not tensor.read().finite():
        yield f"{name} holds values that are not finite (NaN or infinity)."


def _wrong_dense(path: str, tensor: FileTensor, parameters: Mapping[str, Parameter]) -> Iterator[str]:
    name, parameter = shown(tensor.name), parameters.get(path)
    if parameter is None:
        yield f"{name} is unexpected: the base has no parameter {shown(path)}."
        return
    if tensor.dtype not in STORAGE:
        yield f"{name} has dtype {tensor.dtype}; {', '.join(STORAGE)} are served."
    if tensor.shape != parameter.shape:
        turned = ": it looks transposed" if tensor.shape == parameter.shape[::-1] else ""
        yield f"{name} has shape {_shape(tensor.shape)} but must be {_shape(parameter.shape)}{turned}."
    elif tensor.readable and not tensor.read().finite():
        yield f"{name} holds values that are not finite (NaN or infinity)."


def _why(tensor: FileTensor, expected: tuple[int, ...], rank: int) -> str:
    if len(expected) == 1:
        return ": one number for each output"
    if len(expected) == 3:
        return ": one matrix for each expert" if tensor.shape[:-2] != expected[:-2] else ""
    if len(tensor.shape) == 2 and tensor.shape == expected[::-1]:
        return ": it looks transposed"
    at = expected.index(rank)
    if len(tensor.shape) == 2 and tensor.shape[1 - at] == expected[1 - at]:
        return f": the configuration says rank {rank}"
    return ""


def _shape(shape: tuple[int, ...]) -> str:
    return shown("[" + ", ".join(map(str, shape)) + "]")


def adaptable_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Parameter path → (out, in) of every layer of `model` that an adapter may target."""
    from adapters import find  # Checking a file must not need MLX.

    return find.adaptable_layers(model)


def replaceable_parameters(model: nn.Module, layers: Mapping[str, tuple[int, int]], dtype: str) -> dict[str, Parameter]:
    """Parameter path → what a whole tensor may stand for, of a bare `model` with activations of `dtype`."""
    from adapters import find

    return find.replaceable_parameters(model, layers, dtype)
