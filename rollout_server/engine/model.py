"""Loads the base model on the engine thread and finds out how its rows can share a batch."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from adapters.device_check import check_adapters
from adapters.fit import adaptable_layers, replaceable_parameters
from adapters.spec import Place
from rollout_server.engine.base_digest import base_digest
from rollout_server.engine.cache import Forward, PaddedKV, Prompt
from rollout_server.engine.compiled import CompiledDecode, Unrouted
from rollout_server.engine.embedding_messages import Embedding
from rollout_server.engine.hidden import UNFIT, find_trunk
from rollout_server.engine.joined_cache import MlxCacheKV
from rollout_server.engine.loading import ReadModel, read_model
from rollout_server.engine.messages import EngineOptions, ModelInfo
from rollout_server.engine.row_store import KVStore
from rollout_server.engine.sampler_check import check_sampler
from rollout_server.engine.sentence_files import read_embedding
from rollout_server.engine.warming import warm_sampler
from rollout_server.errors import EngineUnavailable

log = logging.getLogger(__name__)

SELF_TEST_LENGTHS = (3, 9, 6)
SAMPLED_ROWS = 12


@dataclass(frozen=True, slots=True, eq=False)
class ResidentModel:
    """The base in memory. `make_store` gives empty KV rows of the kind the self-test chose."""

    module: nn.Module
    tokenizer: Any
    """transformers' tokenizer for the engine thread (stop strings)."""
    host_tokenizer: Any
    """The same for the event loop: a tokenizer is not to be shared between threads."""
    dtype: mx.Dtype
    info: ModelInfo
    make_store: Callable[[], KVStore]
    compiles: bool = False
    """Decode steps are traced once for each shape, see `compiled.CompiledDecode`."""
    trunk: str = ""
    """Path of the part of `module` that gives hidden states; empty if none does."""

    def forward(self, tokens: mx.array, caches: list[Any]) -> mx.array:
        """tokens int32 [B, N] → logits [B, N, V] in the model's dtype, lazily: the head runs only if they are read."""
        return self.module(tokens, cache=caches)

    def hidden(self, tokens: mx.array, caches: list[Any]) -> mx.array:
        """tokens int32 [B, N] → states after the final norm [B, N, width], in the model's dtype, lazily."""
        return attrgetter(self.trunk)(self.module)(tokens, cache=caches)

    def make_padded(self) -> PaddedKV:
        """Empty rows with columns; only where `info.cache` is `slots`."""
        store = self.make_store()
        if not isinstance(store, PaddedKV):
            raise RuntimeError("A model with slot caches made another kind of store.")
        return store

    def make_caches(self) -> list[Any]:
        """Fresh mlx-lm caches for one sequence."""
        return make_prompt_cache(self.module)


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
    chosen = _choose_store(module, vocabulary, options.max_batch, compiles, packs=options.kv_bits is not None)
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


# ---- which cache ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Chosen:
    kind: str
    cell_bytes: int
    """Per row and column."""
    row_cells: int
    """Columns' worth that a row takes besides."""
    make: Callable[[], KVStore]
    compiles: bool = False


def _choose_store(module: nn.Module, vocabulary: int, max_rows: int, compiles: bool, *, packs: bool) -> _Chosen:
    """The first kind of cache under which rows of different lengths equal themselves alone. Falls back to one row at a
    time, and says so; decode steps are compiled only where they then pass the same test. Raises `EngineUnavailable`
    where keys and values are to be kept in 8 bits and cannot be."""
    forward: Forward = lambda tokens, caches: module(tokens, cache=caches)  # noqa: E731
    make_caches = lambda: make_prompt_cache(module)  # noqa: E731
    rows = [[(7 * i + 3 * length) % vocabulary for i in range(length)] for length in SELF_TEST_LENGTHS]
    expected = [_alone(forward, module, row) for row in rows]
    problem, windows = "the state of some layers is not columns of keys and values", _windows(module)
    if windows is not None:
        make = partial(PaddedKV, windows, max_rows)
        found = _choose_slots(forward, make, rows, expected, compiles, packs=packs)
        if isinstance(found, _Chosen):
            return found
        problem = found
    if packs:
        raise EngineUnavailable(
            f"This model cannot keep its keys and values in 8 bits ({problem}): leave --kv-bits out."
        )
    if windows is not None:
        log.warning("This model cannot use slot caches (%s).", problem)
    cell, row_cells = _measure_caches(forward, make_caches, vocabulary)
    if (fault := _self_test(forward, MlxCacheKV(make_caches), rows, expected)) is None:
        return _Chosen("batch", cell, row_cells, lambda: MlxCacheKV(make_caches, row_cells=row_cells))
    log.warning("Rows of this model cannot share a batch (%s): it is served one row at a time.", fault)
    return _Chosen("serial", cell, row_cells, lambda: MlxCacheKV(make_caches, row_cells=row_cells, serial=True))


def _choose_slots(
    forward: Forward,
    make: Callable[..., PaddedKV],
    rows: Sequence[Sequence[int]],
    expected: Sequence[mx.array],
    compiles: bool,
    *,
    packs: bool,
) -> _Chosen | str:
    """Slot caches, or why not. What is wrong in 8 bits alone shows once the same model has passed without."""
    store = make()
    if (problem := _self_test(forward, store, rows, expected)) is not None:
        return problem
    if packs:
        make = partial(make, packs=True)
        store = make()
        if (problem := _self_test(forward, store, rows, expected)) is not None:
            return problem
    cell = store.nbytes // (store.capacity * store.columns)
    if compiles:
        store = make(coarse=True)
        problem = _self_test(forward, store, rows, expected, CompiledDecode(forward, store, Unrouted()))
        if problem is None:
            return _Chosen("slots", cell, 0, partial(make, coarse=True), True)
        log.warning("Decode steps of this model cannot be compiled (%s): they run as they are.", problem)
    return _Chosen("slots", cell, 0, make)


def _measure_caches(forward: Forward, make_caches: Callable[[], list[Any]], vocabulary: int) -> tuple[int, int]:
    """Bytes per token of mlx-lm's caches, and how many tokens' worth a row costs whatever its length."""
    # KVCache allocates 256 columns at a time.
    sizes = []
    for length in (256, 512):
        caches = make_caches()
        forward(mx.array([[i % vocabulary for i in range(length)]], dtype=mx.int32), caches)
        mx.eval([cache.state for cache in caches])
        sizes.append(sum(cache.nbytes for cache in caches))
    cell = max(1, (sizes[1] - sizes[0]) // 256)
    return cell, max(0, sizes[0] - 256 * cell) // cell


def _windows(module: nn.Module) -> list[int | None] | None:
    """Per layer the sliding window or None; None for the whole if some layer's state is not columns."""
    windows: list[int | None] = []
    for cache in make_prompt_cache(module):
        if type(cache) is KVCache:
            windows.append(None)
        elif type(cache) is RotatingKVCache and cache.keep == 0:
            windows.append(int(cache.max_size))
        else:
            return None
    return windows


def _alone(forward: Forward, module: nn.Module, row: Sequence[int]) -> mx.array:
    """float32 logits [V] after the row, by one plain forward."""
    logits = forward(mx.array([list(row)], dtype=mx.int32), make_prompt_cache(module))[0, -1].astype(mx.float32)
    mx.eval(logits)
    return logits


def _self_test(
    forward: Forward,
    store: KVStore,
    rows: Sequence[Sequence[int]],
    expected: Sequence[mx.array],
    decode: Forward | None = None,
) -> str | None:
    """Prefills all rows but their last token, decodes the last one in a batch, compares with each alone."""
    ignore: Callable[[Sequence[int]], None] = lambda slots: None  # noqa: E731
    longest = max(len(row) for row in rows)
    prompts = [Prompt(tuple(row[:-1]), 0) for row in rows]
    try:
        for prompt in prompts:
            store.begin(prompt, 1, longest)
        store.prefill(forward, [(prompt, len(prompt.tokens)) for prompt in prompts], ignore)
        places = [store.seat(prompt, 1, False)[0] for prompt in prompts]
        inputs, offsets = [0] * store.capacity, [None] * store.capacity
        for place, row in zip(places, rows, strict=True):
            inputs[place], offsets[place] = row[-1], len(row) - 1  # type: ignore[call-overload]
        store.set_positions(offsets, longest)
        tokens = mx.array(inputs, dtype=mx.int32)[:, None]
        logits = (decode or forward)(tokens, store.layers)[:, -1].astype(mx.float32)
        mx.eval(logits)
    except UNFIT as error:
        return f"{type(error).__name__}: {error}"
    scale = max(float(mx.max(mx.abs(row))) for row in expected)
    # float32 hardly depends on the batch's shape; the half precisions visibly do, and 8 bits move every number.
    tolerance = 1e-4 * max(1.0, scale) if store_dtype(store) == mx.float32 else 0.05 * max(1.0, scale)
    for index, (place, alone) in enumerate(zip(places, expected, strict=True)):
        gap = float(mx.max(mx.abs(logits[place] - alone)))
        if not gap <= tolerance:
            return f"row {index} of three differs by {gap:.2g} from itself alone"
    return None


def store_dtype(store: KVStore) -> mx.Dtype:
    for layer in store.layers:
        keys = getattr(layer, "keys", None)
        if keys is not None:
            return keys.dtype
    return mx.float32
