"""Adapters on stacked experts, as PEFT writes them: for parameters (transformers 5) or for each expert (before).

With `target_parameters`, PEFT keeps a stack's A as [experts × rank, in] and its B as [out, rank × experts], the expert
running fastest; gate and up are one parameter and share their A. Several parameters of one module are nested: the last
one's tensors hang on the module, those before it under one `base_layer` each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from adapters.errors import AdapterUnsupported, shown
from adapters.faults import Fault
from adapters.formats.fit import unserved
from adapters.formats.peft_names import Block
from adapters.spec import HALVES, ModuleSpec
from adapters.tensors import FileTensor

Parts = dict[tuple[str, str], FileTensor]
PARAMETERS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""The parameters of a block in transformers 5, in their order, with the stacks of mlx-lm that each of them holds."""


@dataclass(slots=True)
class Stacks:
    """What a file says about the stacks of a base, under the base's names."""

    modules: dict[str, ModuleSpec] = field(default_factory=dict)
    tensors: Parts = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)


def of_parameters(block: Block, wanted: Mapping[str, ModuleSpec], parts: Parts) -> Stacks:
    """Takes the tensors of the adapted parameters of `block` (`gate_up_proj`, `down_proj`) out of `parts`."""
    found = Stacks()
    adapted = [name for name in PARAMETERS if name in wanted]
    for depth, name in enumerate(reversed(adapted)):
        spec, holder = wanted[name], block.name + ".base_layer" * depth
        stacks = PARAMETERS[name]
        out, width = sum(block.shapes[stack][0] for stack in stacks), block.shapes[stacks[0]][1]
        flat = spec.rank * block.experts
        pair = [parts.pop((holder, half), None) for half in HALVES]
        a, b = (
            _matrix(tensor, shape, f"{holder}.{half}.weight", found.faults)
            for tensor, shape, half in zip(pair, ((flat, width), (out, flat)), HALVES, strict=True)
        )
        if a is None or b is None or pair[0] is None or pair[1] is None:
            continue
        a = a.reshape(block.experts, spec.rank, width)
        b = b.reshape(out, spec.rank, block.experts).transpose(2, 0, 1)
        for index, stack in enumerate(stacks):
            rows = b
            if len(stacks) == 2:
                rows = b[:, index::2] if block.interleaved else b[:, index * (out // 2) : (index + 1) * (out // 2)]
            path = f"{block.base}.{stack}"
            found.modules[path] = spec
            found.tensors[path, HALVES[0]] = _tensor(pair[0], a)
            found.tensors[path, HALVES[1]] = _tensor(pair[1], rows)
    return found


def of_each_expert(block: Block, modules: dict[str, ModuleSpec], parts: Parts) -> Stacks:
    """Takes the experts' own layers out of `modules` and their tensors out of `parts`, and stacks them. Raises
    `AdapterUnsupported` where not all experts are adapted alike."""
    found = Stacks()
    for stack, shape in block.shapes.items():
        paths = [block.one(stack, expert) for expert in range(block.experts)]
        specs = [modules.pop(path) for path in paths if path in modules]
        if not specs:
            continue
        if len(specs) < block.experts or len(set(specs)) > 1:
            raise AdapterUnsupported(
                {
                    "target_modules": f"The experts of {shown(block.name)} must all be adapted, with one rank and "
                    f"scale; {len(specs)} of {block.experts} are, with {len(set(specs))} of them."
                }
            )
        path, rank = f"{block.base}.{stack}", specs[0].rank
        found.modules[path] = ModuleSpec(rank, specs[0].scale, "experts")
        for half, expected in zip(HALVES, ((rank, shape[1]), (shape[0], rank)), strict=True):
            files = [parts.pop((one, half), None) for one in paths]
            arrays = [
                _matrix(tensor, expected, f"{one}.{half}.weight", found.faults)
                for one, tensor in zip(paths, files, strict=True)
            ]
            whole = [array for array in arrays if array is not None]
            kept = [tensor for tensor in files if tensor is not None]
            if len({tensor.dtype for tensor in kept}) > 1:
                what = "have several dtypes: save them alike"
                found.faults.append(Fault(f"The experts' {half} of {shown(block.name)} {what}."))
            elif len(whole) == block.experts:
                found.tensors[path, half] = _tensor(kept[0], np.stack(whole))
    return found


def joined(stacks: Iterable[Stacks]) -> Stacks:
    whole = Stacks()
    for one in stacks:
        whole.modules |= one.modules
        whole.tensors |= one.tensors
        whole.faults += one.faults
    return whole


def _matrix(
    tensor: FileTensor | None, shape: tuple[int, int], name: str, faults: list[Fault]
) -> NDArray[np.generic] | None:
    """The tensor's values, or None and a fault."""
    if tensor is None:
        said = f"{name} is missing: the configuration targets it."
        faults.append(Fault(said, "tensors are missing, which the configuration targets", name))
    elif not tensor.readable:
        faults.append(unserved(tensor))
    elif tensor.shape != shape:
        what = f"{shown(tensor.name)} has shape {shown(list(tensor.shape))} but must be {list(shape)}"
        faults.append(Fault(f"{what} for these experts.", "tensors have shapes that do not fit the experts", what))
    else:
        return tensor.read().array
    return None


def _tensor(source: FileTensor, array: NDArray[np.generic]) -> FileTensor:
    return FileTensor(source.name, source.dtype, array.shape, np.ascontiguousarray(array).tobytes())
