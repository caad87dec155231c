"""The sizes that a model is served with on this device: how many rows, how large a chunk, and how much KV memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.model.footprints import check_share
from rollout_server.engine.model.kv_choice import ChosenStore
from rollout_server.engine.ranks.ranks import Ranks
from rollout_server.errors import EngineUnavailable
from rollout_server.machine.device_defaults import (
    ACTIVATIONS,
    ADAPTERS,
    LOGITS,
    DeviceDefaults,
    Footprint,
    choose,
    in_words,
)
from rollout_server.machine.this_device import this_device

log = logging.getLogger("rollout_server.engine.model")


def chosen_sizes(
    options: EngineOptions,
    store: ChosenStore,
    layers: Mapping[str, tuple[int, int]],
    vocabulary: int,
    dtype: mx.Dtype,
    weight_bytes: int,
    ranks: Ranks | None = None,
) -> DeviceDefaults:
    """What was asked for, and for the rest what this device has room for beside the model, which the log then says.
    `dtype` is that of activations, `layers` has (out, in) of every layer. A model whose rows cannot share a batch is
    served one row at a time, whatever was asked for; several `ranks` admit what the smallest of them has room for.
    Raises `EngineUnavailable` where that is more than the model's share of --memory."""
    footprint = Footprint(
        weights=weight_bytes,
        kv_token=store.cell_bytes,
        activations_token=ACTIVATIONS * _widest(layers, vocabulary) * dtype.size,
        logits_row=LOGITS * vocabulary,
        adapters=options.weights_memory or weight_bytes // ADAPTERS,
        kv_row=store.cell_bytes * store.row_cells,
    )
    device = this_device()
    device = replace(device, memory=device.memory // options.sharing)
    _check_kv(options, device.memory, weight_bytes)
    sizes = choose(
        device,
        footprint,
        max_batch=1 if store.kind == "serial" else options.max_batch,
        prefill_tokens=options.prefill_tokens,
        kv_memory=options.kv_memory,
    )
    for sentence in sizes.sentences():
        log.info("%s", sentence)
    if (rows := store.fits(sizes.max_batch.value)) < sizes.max_batch.value:
        reason = "MLX cannot turn more rows at once on this device where so few numbers of a head are turned."
        log.warning("--max-batch is %d: %s", rows, reason)
        sizes = replace(sizes, max_batch=replace(sizes.max_batch, value=rows, reason=reason))
    sizes = sizes if ranks is None else least_of(ranks, sizes)
    check_share(options.model_id, options.memory, weight_bytes, options.weights_memory, sizes.kv_memory.value)
    return sizes


def _check_kv(options: EngineOptions, memory: int, weight_bytes: int) -> None:
    """Raises `EngineUnavailable` where rows could never fill what they are promised. With --memory it was counted."""
    asked, left = options.kv_memory, memory - weight_bytes
    if asked is not None and options.memory is None and asked > left:
        raise EngineUnavailable(
            f"--kv-memory is {in_words(asked)}, but of this device's {in_words(memory)} the weights leave "
            f"{in_words(max(left, 0))}: give less, or leave the option out, and a part of that is taken."
        )


def _widest(layers: Mapping[str, tuple[int, int]], vocabulary: int) -> int:
    """The widest of the layers that every token goes through; the head is read at few tokens, and of the embedding one
    entry."""
    return max((max(shape) for shape in layers.values() if vocabulary not in shape), default=vocabulary)


def least_of(ranks: Ranks, sizes: DeviceDefaults) -> DeviceDefaults:
    """What the smallest of several ranks has room for: all of them admit the same rows."""
    names = ("max_batch", "prefill_tokens", "kv_memory")
    least = ranks.least([getattr(sizes, name).value for name in names])
    return replace(
        sizes, **{name: replace(getattr(sizes, name), value=value) for name, value in zip(names, least, strict=True)}
    )


def parameters_of(module: nn.Module) -> int:
    """How many values a model has, packed ones counted as what they stand for. Reads no weights."""
    flat: list[tuple[str, mx.array]] = tree_flatten(module.parameters())  # type: ignore[assignment]
    total = 0
    for _, layer in module.named_modules():
        if isinstance(layer, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            total -= layer.weight.size + layer.scales.size
            total += layer.weight.size * 32 // layer.bits
            biases = layer.get("biases")
            total -= biases.size if biases is not None else 0
    return total + sum(array.size for _, array in flat)
