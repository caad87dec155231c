"""Which layers of a model an adapter may change, and where each of them hangs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import (
    AllToShardedLinear,
    QuantizedAllToShardedLinear,
    QuantizedShardedToAllLinear,
    ShardedToAllLinear,
)
from mlx.utils import tree_flatten

from adapters.resident.layers.embedding import AdaptedEmbedding
from adapters.resident.layers.experts import EXPERT_LAYERS, AdaptedExperts
from adapters.resident.layers.linear import AdaptedLinear
from adapters.spec import (
    TIED_HEAD,
    EmbeddingShape,
    ExpertsShape,
    Parameter,
    TiedEmbeddingShape,
    TiedHeadShape,
    place_of,
)

PACKED = ("scales", "biases", "global_scale")
"""Names of the arrays that belong to a quantised weight."""
ADAPTED = (AdaptedLinear, AdaptedEmbedding, AdaptedExperts)
CUT_OUTPUTS = (AllToShardedLinear, QuantizedAllToShardedLinear)
"""Linear layers of which this rank has some of the outputs."""
CUT_INPUTS = (ShardedToAllLinear, QuantizedShardedToAllLinear)
"""Linear layers of which this rank reads some of the inputs."""
LINEAR = (nn.Linear, nn.QuantizedLinear, *CUT_OUTPUTS, *CUT_INPUTS)


def adaptable_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Parameter path → (out, in) of every linear layer, quantised or not, adapted or not, of stacked experts, of the
    token embedding, and of the head that shares its weight, sorted by path. One that is cut over ranks has the shape
    of the whole layer, as adapters do. Not while a batch of several versions is routed: it runs a forward pass,
    lazily."""
    modules = {path: bare_layer(module) for path, module in model.named_modules()}
    wrapped = {f"{path}.base" for path, module in model.named_modules() if isinstance(module, ADAPTED)}
    modules = {path: module for path, module in modules.items() if path not in wrapped}
    found: dict[str, tuple[int, int]] = {}
    for path, module in modules.items():
        if isinstance(module, LINEAR):
            found[path] = _shape(module)
        elif type(module) in EXPERT_LAYERS:
            found |= {f"{path}.{name}": _experts_shape(module[name]) for name in EXPERT_LAYERS[type(module)]}
    return dict(sorted((found | _embedding(model, modules)).items()))


def _embedding(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """The token embedding, found by watching a forward pass that is never evaluated; none if the model reads the
    embedding's weight past the layer, as an adapter would not reach it there."""
    tables = {path: m for path, m in modules.items() if isinstance(m, nn.Embedding | nn.QuantizedEmbedding)}
    if not tables:
        return {}
    path = max(tables, key=lambda name: tables[name]["weight"].shape[0])
    parent, name = holder(model, path)
    watched = _Watched(tables[path])
    mounted = parent[name]
    parent[name] = watched
    try:
        model(mx.array([[0]]))
    except AttributeError:
        return {}
    finally:
        parent[name] = mounted
    vocabulary, values = _shape(tables[path])
    if not watched.is_head:
        return {path: EmbeddingShape(values, vocabulary)}
    return {path: TiedEmbeddingShape(values, vocabulary), TIED_HEAD: TiedHeadShape(vocabulary, values)}


def bare_layer(layer: nn.Module) -> nn.Module:
    bare: nn.Module = layer["base"] if isinstance(layer, ADAPTED) else layer
    return bare


class _Watched(nn.Module):
    """An embedding that notes whether it is used as a head."""

    def __init__(self, base: nn.Embedding | nn.QuantizedEmbedding) -> None:
        super().__init__()
        self._base = (base,)  # No child: a mode that is set while it is watched is set on the model's own layer.
        self.is_head = False

    def __call__(self, tokens: mx.array) -> mx.array:
        return self._base[0](tokens)

    def as_linear(self, x: mx.array) -> mx.array:
        self.is_head = True
        return self._base[0].as_linear(x)


def replaceable_parameters(model: nn.Module, layers: Mapping[str, tuple[int, int]], dtype: str) -> dict[str, Parameter]:
    """Parameter path → shape and dtype, for a model without adapters; a quantised weight is one parameter, as if it
    were unpacked, and a head that shares the embedding's weight has one of its own, `lm_head.weight`."""
    arrays: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    packed = {name.removesuffix(".scales") for name in arrays if name.endswith(".scales")}
    packed = {path for path in packed if arrays.get(f"{path}.weight", mx.zeros(0)).dtype == mx.uint32}
    found: dict[str, Parameter] = {}
    for name, array in arrays.items():
        path, _, key = name.rpartition(".")
        if path in packed and key == "weight":
            width = arrays[f"{path}.scales"].shape[-1] * _group_size(model, path)
            found[name] = Parameter((*array.shape[:-1], width), dtype, quantised=True)
        elif mx.issubdtype(array.dtype, mx.floating) and not (path in packed and key in PACKED):
            found[name] = Parameter(tuple(array.shape), str(array.dtype).removeprefix("mlx.core."))
    tied = next((path for path, shape in layers.items() if isinstance(shape, TiedEmbeddingShape)), None)
    if tied is not None:
        found[f"{TIED_HEAD}.weight"] = found[f"{tied}.weight"]
    return dict(sorted(found.items()))


def _group_size(model: nn.Module, path: str) -> int:
    parent, name = holder(model, path)
    return int(parent[name].group_size)


def bare_holder(model: nn.Module, path: str) -> tuple[Any, str | int]:
    """What holds the base's own module or array at `path`, and its key there, past whatever wraps it now."""
    node: Any = model
    *parts, name = (int(part) if part.isdigit() else part for part in path.split("."))
    for part in parts:
        node = node[part]
        if isinstance(node, ADAPTED):
            node = node["base"]
    return (node[name], "base") if isinstance(node[name], ADAPTED) else (node, name)


def holder(model: nn.Module, path: str) -> tuple[Any, str | int]:
    """The module, list or dictionary that holds the layer at `path`, and the layer's key there."""
    node: Any = model
    *parts, name = (int(part) if part.isdigit() else part for part in path.split("."))
    for part in parts:
        node = node[part]
    return node, name


def own_layers(model: nn.Module, layers: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The same layers with (out, in) of what this rank has of each; `layers` are those of the model before it was cut,
    by which those are known whose rows are cut by the block around them."""
    found: dict[str, tuple[int, int]] = {}
    for path, shape in layers.items():
        if place_of(shape) not in ("linear", "experts"):
            found[path] = shape
            continue
        parent, name = holder(model, path)
        own = _own_shape(bare_layer(parent[name]))
        found[path] = ExpertsShape(*own, shape.experts) if isinstance(shape, ExpertsShape) else own
    return found


def _shape(layer: nn.Module) -> tuple[int, int]:
    """The shape of the weight as it would be unpacked and whole: of a quantised one the groups count the columns."""
    rows, width = _own_shape(layer)
    if isinstance(layer, CUT_OUTPUTS):
        return rows * layer.group.size(), width
    return (rows, width * layer.group.size()) if isinstance(layer, CUT_INPUTS) else (rows, width)


def _own_shape(layer: nn.Module) -> tuple[int, int]:
    *_, rows, columns = layer.weight.shape
    return rows, layer.scales.shape[-1] * layer.group_size if "scales" in layer else columns


def _experts_shape(layer: nn.Module) -> ExpertsShape:
    return ExpertsShape(layer.output_dims, layer.input_dims, layer.num_experts)
