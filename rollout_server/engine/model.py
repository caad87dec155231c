"""Loads the base model on the engine thread."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models.cache import make_prompt_cache

from adapters.device_check import check_adapters
from adapters.fit import adaptable_layers, replaceable_parameters
from adapters.spec import Place
from rollout_server.engine.base_digest import base_digest
from rollout_server.engine.hidden import find_trunk
from rollout_server.engine.kv_choice import choose_store
from rollout_server.engine.loading import ReadModel, read_model
from rollout_server.engine.messages.options import Embedding, EngineOptions, ModelInfo
from rollout_server.engine.resident import ResidentModel
from rollout_server.engine.sampling.sampler import warm_sampler
from rollout_server.engine.sampling.sampler_check import check_sampler
from rollout_server.engine.sentence_files import read_embedding
from rollout_server.errors import EngineUnavailable

log = logging.getLogger("rollout_server.engine.model")
SAMPLED_ROWS = 12


def load(options: EngineOptions) -> ResidentModel:
    """Raises `EngineUnavailable` with the cause if the directory holds no model we can serve."""
    path = Path(options.model_path)
    read = read_model(path)
    module, config = read.module, read.config
    on_cpu = mx.default_device() == mx.cpu
    if on_cpu:
        _to_float32(module)
    module.eval()
    module.freeze()
    mx.eval(module.parameters())
    dtype = _activation_dtype(module)
    vocabulary = _vocabulary(module, config)
    compiles = not on_cpu if options.compile_decode is None else options.compile_decode
    chosen = choose_store(module, vocabulary, options.max_batch, compiles, packs=options.kv_bits is not None)
    kind, cell_bytes, row_cells = chosen.kind, chosen.cell_bytes, chosen.row_cells
    context = _context_length(read, options.context_length)
    trunk, width = find_trunk(module, vocabulary) or ("", 0)
    layers, dtype_name = adaptable_layers(module), str(dtype).removeprefix("mlx.core.")
    unfit = _check_device(module, layers, vocabulary, dtype)
    info = ModelInfo(
        id=options.model_id,
        digest=base_digest(path),
        model_type=str(config.get("model_type", "unknown")),
        vocab_size=vocabulary,
        max_model_len=context,
        dtype=dtype_name,
        quantization=config.get("quantization"),
        eos_token_ids=_end_tokens(config, read.tokenizer, vocabulary),
        parameters=_parameters(module),
        weight_bytes=sum(array.nbytes for array in _arrays(module)),
        layers=layers,
        weights=replaceable_parameters(module, layers, dtype_name),
        unfit=unfit,
        kv_bytes_per_token=cell_bytes,
        kv_bytes_per_row=cell_bytes * row_cells,
        kv_bits=options.kv_bits,
        kv_memory=options.kv_memory or default_kv_memory(),
        cache=kind,
        embedding=read_embedding(path, config, width) if trunk else Embedding(),
        max_batch=1 if kind == "serial" else options.max_batch,
        device=str(mx.default_device()),
    )
    if not on_cpu:
        warm_sampler(vocabulary, dtype, min(8, info.max_batch))
    return ResidentModel(module, read.tokenizer, read.host_tokenizer, dtype, info, chosen.make, chosen.compiles, trunk)


def _check_device(
    module: nn.Module, layers: dict[str, tuple[int, int]], vocabulary: int, dtype: mx.Dtype
) -> dict[Place, str]:
    """Kinds of layers on which this device computes adapters wrongly, which the log then says. Raises
    `EngineUnavailable` where it samples wrongly, since nothing could be served."""
    if (fault := check_sampler(vocabulary, dtype, SAMPLED_ROWS)) is not None:
        raise EngineUnavailable(
            f"This device does not compute what the sampler asks of it: {fault}. Nothing can be served here; "
            "`rollout-server doctor` says more about the device."
        )
    unfit = check_adapters(module, layers, dtype)
    for place, why in unfit.items():
        log.error("Adapters on layers of the kind %s are refused: this device computes them wrongly, %s.", place, why)
    return unfit


def _end_tokens(config: dict[str, Any], tokenizer: Any, vocabulary: int) -> tuple[int, ...]:
    """What ends a row: the model's own end tokens (generation config included) and the tokenizer's."""
    own = config.get("eos_token_id")
    ends = {own} if isinstance(own, int) else set(own or ())
    ends |= {tokenizer.eos_token_id} - {None}
    # One outside the logits could never be sampled, and would be written out of bounds where it is banned.
    return tuple(sorted(token for token in ends if 0 <= token < vocabulary))


def default_kv_memory() -> int:
    """A quarter of what the device may use, in bytes."""
    info = mx.device_info()
    # Metal says memory_size, CUDA total_memory, the CPU neither.
    for name in ("memory_size", "total_memory"):
        memory = info.get(name)
        if isinstance(memory, int) and memory > 0:
            return memory // 4
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


def _to_float32(module: nn.Module) -> None:
    """bf16 and f16 products do not go through BLAS on the CPU. Packed weights and their scales stay as they are,
    except that scales decide the activations' dtype and so become float32 too."""

    def cast(_: str, array: mx.array) -> mx.array:
        return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array

    module.update(tree_map_with_path(cast, module.parameters()))


def _arrays(module: nn.Module) -> list[mx.array]:
    flat: list[tuple[str, mx.array]] = tree_flatten(module.parameters())  # type: ignore[assignment]
    return [array for _, array in flat]


def _activation_dtype(module: nn.Module) -> mx.Dtype:
    """The dtype of norms and scales: what the residual stream and the KV come out in."""
    counts: dict[mx.Dtype, int] = {}
    for array in _arrays(module):
        if mx.issubdtype(array.dtype, mx.floating):
            counts[array.dtype] = counts.get(array.dtype, 0) + 1
    return max(counts, key=lambda dtype: counts[dtype])


def _parameters(module: nn.Module) -> int:
    total = 0
    for _, layer in module.named_modules():
        if isinstance(layer, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            total -= layer.weight.size + layer.scales.size
            total += layer.weight.size * 32 // layer.bits
            biases = layer.get("biases")
            total -= biases.size if biases is not None else 0
    return total + sum(array.size for array in _arrays(module))


def _vocabulary(module: nn.Module, config: dict[str, Any]) -> int:
    """Width of the logits, which may exceed the tokenizer's vocabulary."""
    logits = module(mx.array([[0]], dtype=mx.int32), cache=make_prompt_cache(module))
    return int(logits.shape[-1])


def _context_length(read: ReadModel, asked: int | None) -> int:
    """Tokens of prompt and reply, no more than what the module computes as config.json says. Raises
    `EngineUnavailable` where more is asked for."""
    own = read.max_position_embeddings
    context = (asked or 32768) if own is None else min(own, asked or own)
    bound = min(read.bounds, key=lambda bound: bound.tokens, default=None)
    if bound is None or context <= bound.tokens:
        return context
    if asked is not None:
        raise EngineUnavailable(
            f"--context-length asks for {asked} tokens, but this model is exact up to {bound.tokens}: {bound.reason}."
        )
    log.warning("The context is bounded to %d tokens: %s.", bound.tokens, bound.reason)
    return bound.tokens
