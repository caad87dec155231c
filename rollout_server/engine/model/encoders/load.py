"""Reads an encoder's directory into memory: the checkpoint as transformers writes it, its tokenizer, and what its files
say of labels and vectors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from transformers import AutoTokenizer

from adapters.resident.model_layers import adaptable_layers
from rollout_server.engine.model.checkpoint.files import WEIGHTS, check_model, read_config
from rollout_server.engine.model.checkpoint.meaning import Meaning, meaning_of
from rollout_server.engine.model.encoders.architecture import Architecture, architecture_of
from rollout_server.engine.model.encoders.effects import unserved
from rollout_server.engine.model.encoders.encoder import EncoderModel
from rollout_server.engine.model.encoders.passages import Limits
from rollout_server.engine.model.encoders.pooling import Pooling, read_pooling
from rollout_server.engine.model.encoders.reading import padding_fault
from rollout_server.engine.model.footprints import check_room
from rollout_server.errors import EngineUnavailable
from rollout_server.models.encoders.heads import Headed
from rollout_server.quoting import counted

UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, IndexError, ImportError)
"""What MLX, transformers and the libraries below them raise for files that they do not expect."""
REASON = 400
"""Characters shown of an error: MLX lists every parameter that is missing."""
UNNAMED = re.compile(r"LABEL_\d+")


def read_encoder(directory: Path) -> EncoderModel:
    """Raises `EngineUnavailable` with the file or the field at fault if the directory cannot be read, or would be
    another model here than it is in transformers."""
    config = read_config(directory)
    architecture = architecture_of(config, directory)
    said = meaning_of(config)
    if faults := list(unserved(config, said, architecture.family)):
        raise EngineUnavailable(
            f"The model at {directory} ({config['model_type']}) would not be here what it is in transformers: "
            f"{'; '.join(faults)}."
        )
    check_model(directory)
    check_room(directory)
    pooling = read_pooling(directory) if architecture.task == "embed" else Pooling()
    try:
        module, labels = _module(directory, architecture, said)
        _place(module)
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except UNREADABLE as error:
        reason = " ".join(str(error).split())
        shown = reason if len(reason) <= REASON else f"{reason[:REASON]}…"
        raise EngineUnavailable(
            f"The model at {directory} ({config['model_type']}) could not be loaded: {shown.removesuffix('.')}."
        ) from error
    arguments = architecture.family.arguments_of(said.fields)
    longest = min(arguments.max_tokens, pooling.max_tokens or arguments.max_tokens)
    body = module.body if isinstance(module, Headed) else module
    model = EncoderModel(
        module,
        tokenizer,
        architecture.task,
        _named(directory, config, said, labels) if architecture.task != "embed" else (),
        said.fields.get("problem_type"),
        Limits(arguments.vocab_size, longest, arguments.type_vocab_size),
        arguments.pad_token_id or 0,
        arguments.hidden_size,
        pooling,
        _dtype(body),
        adaptable_layers(module),
    )
    if (fault := padding_fault(model)) is not None:
        raise EngineUnavailable(
            f"This device reads sequences of the model at {directory} ({config['model_type']}) otherwise beside longer "
            f"ones than by themselves: {fault}. Nothing could be relied on here."
        )
    return model


def _module(directory: Path, architecture: Architecture, said: Meaning) -> tuple[nn.Module, int]:
    """With its weights, and how many labels its head has."""
    family, task = architecture.family, architecture.task
    weights: dict[str, mx.array] = {}
    for path in sorted(directory.glob(WEIGHTS)):
        weights |= mx.load(str(path))  # type: ignore[arg-type]  # A safetensors file is a dictionary.
    if not weights:
        raise ValueError(f"there are no weights, which lie in {WEIGHTS}")
    arguments = family.arguments_of(said.fields)
    module: nn.Module = family.body(arguments)
    labels = 0
    if task != "embed":
        # transformers leaves the usual number of labels out of config.json; the head is what there is.
        name = f"{family.labels if task == 'classify' else 'classifier'}.weight"
        if name not in weights or weights[name].ndim != 2:
            raise ValueError(f"the weights hold no matrix {name}, which its architecture has")
        labels = weights[name].shape[0]
        make = family.sequence_head if task == "classify" else family.token_head
        module = make(family.trunk, module, arguments, labels)
    module.load_weights(list(family.named(weights, module).items()), strict=True)
    return module, labels


def _place(module: nn.Module) -> None:
    """In memory, ready to read. On the CPU all is float32, as bf16 and f16 products do not go through BLAS there;
    elsewhere the head is."""
    parts = [module] if mx.default_device() == mx.cpu else module.parts if isinstance(module, Headed) else []
    for part in parts:
        part.update(tree_map(lambda array: array.astype(mx.float32), part.parameters()))
    module.eval()
    module.freeze()
    mx.eval(module.parameters())


def _dtype(module: nn.Module) -> mx.Dtype:
    arrays: list[tuple[str, mx.array]] = tree_flatten(module.parameters())  # type: ignore[assignment]
    return arrays[0][1].dtype


def _named(directory: Path, config: Mapping[str, Any], said: Meaning, count: int) -> tuple[str | None, ...]:
    """The labels' names, from the shape of the head. Raises `EngineUnavailable` where config.json has other labels."""
    told = said.fields.get("id2label") or {}
    if ("id2label" in config or "num_labels" in config) and len(told) != count:
        raise EngineUnavailable(
            f"config.json in {directory} has {counted(len(told), 'label')}, and the head has {count}: they have to be "
            "those of one model."
        )
    names = [str(told.get(index, told.get(str(index), ""))) for index in range(count)]
    return tuple(None if not name or UNNAMED.fullmatch(name) else name for name in names)
