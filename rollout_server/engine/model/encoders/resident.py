"""An encoder as the engine serves it: read from its directory, sized for this device, and described."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from transformers import AutoTokenizer

from adapters.resident.cuts import Cut
from adapters.resident.device_check import check_adapters
from adapters.resident.model_layers import replaceable_parameters
from rollout_server.engine.messages.options import Embedding, EngineOptions, ModelInfo
from rollout_server.engine.model.checkpoint.files import read_config
from rollout_server.engine.model.digest import base_digest
from rollout_server.engine.model.encoders.architecture import is_encoder
from rollout_server.engine.model.encoders.encoder import EncoderModel
from rollout_server.engine.model.encoders.load import read_encoder
from rollout_server.engine.model.footprints import check_share
from rollout_server.engine.model.tasks.kinds import activation_of
from rollout_server.errors import EngineUnavailable
from rollout_server.machine.device_defaults import ACTIVATIONS, ADAPTERS, Footprint, choose
from rollout_server.machine.this_device import this_device

log = logging.getLogger("rollout_server.engine.model")
NO_VECTORS = "This model scores labels and gives no vectors: ask it on /classify, /pooling and /v1/rewards."


@dataclass(frozen=True, slots=True, eq=False)
class ResidentEncoder:
    """What versions are staged on, and what reads. Its head is part of `module`."""

    model: EncoderModel
    """Its pooling leaves vectors as long as they come: who asks for them brings them to length 1."""
    host_tokenizer: Any
    """A second one: a tokenizer is not to be shared between threads."""
    info: ModelInfo

    @property
    def module(self) -> Any:
        return self.model.module

    @property
    def dtype(self) -> mx.Dtype:
        return self.model.dtype

    @property
    def adapter_kernel(self) -> None:
        """None: kernels are for decode steps."""

    @property
    def cuts(self) -> Mapping[str, Cut]:
        """None: its layers are whole."""
        return {}

    @property
    def head(self) -> None:
        """None: no head stands apart from `module`."""


def holds_encoder(directory: Path) -> bool:
    """True where config.json is that of an encoder, served or refused."""
    return is_encoder(read_config(directory))


def load_encoder(options: EngineOptions) -> ResidentEncoder:
    """Raises `EngineUnavailable` with the cause if the directory holds no encoder that is served."""
    directory = Path(options.model_path)
    _check_options(options)
    model, config = read_encoder(directory), read_config(directory)
    arrays: list[tuple[str, mx.array]] = tree_flatten(model.module.parameters())  # type: ignore[assignment]
    dtype = str(model.dtype).removeprefix("mlx.core.")
    weight_bytes, budget = sum(array.nbytes for _, array in arrays), options.prefill_tokens
    check_share(options.model_id, options.memory, weight_bytes, options.weights_memory, 0)
    unfit = check_adapters(model.module, model.layers, model.dtype)
    for place, why in unfit.items():
        log.error("Adapters on layers of the kind %s are refused: this device computes them wrongly, %s.", place, why)
    pooling = model.pooling
    info = ModelInfo(
        id=options.model_id,
        digest=base_digest(directory),
        model_type=str(config["model_type"]),
        vocab_size=model.limits.vocabulary,
        max_model_len=min(model.limits.max_tokens, options.context_length or model.limits.max_tokens),
        dtype=dtype,
        quantization=None,
        eos_token_ids=(),
        parameters=sum(array.size for _, array in arrays),
        weight_bytes=weight_bytes,
        layers=model.layers,
        weights=replaceable_parameters(model.module, model.layers, dtype),
        unfit=unfit,
        kv_bytes_per_token=0,
        kv_memory=0,
        cache="none",
        max_batch=0,
        prefill_tokens=_chunk(model, weight_bytes, options) if budget is None else budget,
        device=str(mx.default_device()),
        embedding=Embedding(
            normalise=pooling.normalise,
            width=model.width * len(pooling.modes),
            refusal="" if model.task == "embed" else NO_VECTORS,
        ),
        task=model.task,
        labels=model.labels,
        activation=activation_of(config, len(model.labels)) if model.labels else "none",
        encoder=True,
        token_types=model.limits.token_types,
    )
    host = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    return ResidentEncoder(replace(model, pooling=replace(pooling, normalise=False)), host, info)


def _check_options(options: EngineOptions) -> None:
    """Raises `EngineUnavailable` for what would change numbers of a decoder and means nothing here."""
    if options.kv_bits is not None:
        raise EngineUnavailable("--kv-bits is of keys and values, and an encoder keeps none: leave the option out.")
    if options.kv_memory is not None or options.max_batch is not None:
        log.warning("--kv-memory and --max-batch are of rows that decode: an encoder has none, and reads neither.")


def _chunk(model: EncoderModel, weight_bytes: int, options: EngineOptions) -> int:
    """Tokens of one forward, chosen for this device as those of a decoder's prompts are."""
    widest = max(max(shape) for shape in model.layers.values() if model.limits.vocabulary not in shape)
    footprint = Footprint(
        weights=weight_bytes,
        kv_token=0,
        activations_token=ACTIVATIONS * widest * model.dtype.size,
        logits_row=0,
        adapters=options.weights_memory or weight_bytes // ADAPTERS,
    )
    chunk = choose(this_device(), footprint).prefill_tokens
    log.info("--prefill-tokens is %d: %s", chunk.value, chunk.reason)
    return chunk.value
