"""The weights of a merged or dense version, one parameter at a time, computed in float32 from the base's.

W' = W + scale · B · A, for DoRA with each row brought to its magnitude; the base's W is unpacked where it is quantised,
and replaced first where the version has a whole tensor for it. Nothing is evaluated here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from numpy.typing import NDArray

from adapters.prepare import HostFactors, PreparedBundle
from adapters.resident.model_layers import bare_holder
from adapters.spec import MAGNITUDE, TIED_HEAD, Parameter, Place, place_of

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def merged_weights(
    model: nn.Module,
    layers: Mapping[str, tuple[int, int]],
    parameters: Mapping[str, Parameter],
    prepared: PreparedBundle,
) -> Iterator[tuple[str, mx.array]]:
    """(parameter path, its new value in the parameter's dtype) of all that the version touches, lazily, while the
    base is mounted. A tied head is `lm_head.weight`; its base is the embedding's weight, or a whole tensor for that."""
    spec, dense = prepared.bundle.spec, prepared.dense
    tied = next((path for path, shape in layers.items() if place_of(shape) == "tied_embedding"), None)
    merged = spec.modules.keys() if prepared.mode == "merged" else frozenset()

    def source(path: str) -> mx.array:
        """The weight before any low-rank part: a tensor in place of the base's as it is, else float32."""
        real = f"{tied}.weight" if tied and path == f"{TIED_HEAD}.weight" else path
        given = dense[path] if path in dense else dense.get(real)
        if given is None:
            return base_weight(model, real, parameters[real])
        array = device_array(given, "float32" if spec.kind == "delta" else parameters[path].dtype)
        return base_weight(model, real, parameters[real]) + array if spec.kind == "delta" else array

    paths = dict.fromkeys([*dense, *(f"{path}.weight" for path in merged)])
    if tied in merged and f"{tied}.weight" in dense:
        paths[f"{TIED_HEAD}.weight"] = None  # Which follows the whole tensor, but not the low-rank part.
    for path in paths:
        weight = source(path)
        layer = path.removesuffix(".weight")
        if layer in merged and path.endswith(".weight"):
            magnitude = prepared.bundle.tensors.get(f"{layer}.{MAGNITUDE}")
            gained = None if magnitude is None else mx.array(magnitude.float32())
            place = spec.modules[layer].place
            weight = merge(weight.astype(mx.float32), prepared.factors[layer], gained, place)
        yield path, weight.astype(DTYPES[parameters[path].dtype])


def merge(weight: mx.array, factors: HostFactors, magnitude: mx.array | None, place: Place) -> mx.array:
    """W + scale · B · A with its rows brought to `magnitude` [out], in the layout of the layer at `place`, float32."""
    turned = place in ("embedding", "tied_embedding")
    a, b = mx.array(factors.a), mx.array(factors.b)
    delta = b.swapaxes(-1, -2) @ a
    weight = weight + (delta.T if turned else delta)
    if magnitude is None:
        return weight
    gain = magnitude / mx.sqrt(mx.sum(mx.square(weight), axis=0 if turned else -1))
    return weight * gain if turned else weight * gain[:, None]


def base_weight(model: nn.Module, path: str, parameter: Parameter) -> mx.array:
    """A parameter of the base, unpacked, float32."""
    holder, key = bare_holder(model, path)
    array: mx.array = holder[key]
    if not parameter.quantised:
        return array.astype(mx.float32)
    return mx.dequantize(
        array,
        _scales(holder["scales"], holder.get("biases")),
        None if holder.get("biases") is None else holder["biases"].astype(mx.float32),
        holder.group_size,
        holder.bits,
        holder.mode,
        holder.get("global_scale"),
        dtype=mx.float32,
    )


def _scales(scales: mx.array, biases: mx.array | None) -> mx.array:
    """The scales to unpack with. In the affine mode they decide the precision; in others they are packed."""
    return scales if biases is None else scales.astype(mx.float32)


def device_array(values: NDArray[Any], dtype: str) -> mx.array:
    """The device array of host values in this dtype; bfloat16 comes as its bits."""
    array = mx.array(values)
    return array.view(mx.bfloat16) if dtype == "bfloat16" else array
