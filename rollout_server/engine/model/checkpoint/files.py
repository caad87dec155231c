"""The files of a model directory, read and checked one by one: what is wrong is said with the file's name, before
anything heavy begins."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rollout_server.errors import EngineUnavailable
from rollout_server.quoting import quoted

log = logging.getLogger(__name__)

WEIGHTS, INDEX = "model*.safetensors", "model.safetensors.index.json"
HEADER_LIMIT = 100_000_000
"""Bytes that safetensors allows a header."""
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "*.tiktoken",
    "tiktoken.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
WHOLE_NUMBERS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "intermediate_size",
    "head_dim",
    "max_position_embeddings",
    "n_embd",
    "n_head",
    "n_layer",
)
SMALL = 3
"""Names that a sentence lists."""


class _Broken(Exception):
    """What is wrong with a file, as the second half of a sentence that begins with its path."""


def read_config(directory: Path) -> dict[str, Any]:
    """config.json. Raises `EngineUnavailable`."""
    path = directory / "config.json"
    try:
        config = _object(path)
        for part, place in ((config, ""), (config.get("text_config"), "text_config.")):
            for name in WHOLE_NUMBERS:
                _check_number(part.get(name) if isinstance(part, dict) else None, place + name)
    except _Broken as fault:
        raise _refused(path, fault) from None
    return config


def check_model(directory: Path) -> None:
    """The weights, the tokenizer and the smaller files. Raises `EngineUnavailable`."""
    checks: list[tuple[Path, Callable[[Path], object]]] = [
        (directory / INDEX, _check_index),
        *((path, _check_weights) for path in sorted(directory.glob(WEIGHTS))),
        (directory / "tokenizer.json", _check_tokenizer),
        (directory / "tokenizer_config.json", _object),
        (directory / "special_tokens_map.json", _object),
        (directory / "generation_config.json", _check_generation),
    ]
    for path, check in checks:
        try:
            if path.exists() or path.is_symlink():
                check(path)
        except _Broken as fault:
            raise _refused(path, fault) from None
    if not any(next(directory.glob(name), None) for name in TOKENIZERS):
        own = directory / "tokenizer_config.json"
        brings_code = own.is_file() and "auto_map" in _object(own)
        raise EngineUnavailable(
            f"{directory} holds no tokenizer ({', '.join(TOKENIZERS[:2])} or vocab.json): copy the files that "
            "`save_pretrained` of the tokenizer writes beside the weights."
            + (" It brings code of its own, which this server never runs." if brings_code else "")
        )


def _refused(path: Path, fault: Exception) -> EngineUnavailable:
    return EngineUnavailable(f"{path} {fault}.")


def _object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise _Broken(f"cannot be read ({error.strerror})") from None
    except RecursionError:
        raise _Broken("is not JSON that can be read: it is nested too deeply") from None
    except UnicodeDecodeError:
        raise _Broken("is not JSON: it is not text in UTF-8") from None
    except json.JSONDecodeError as error:
        if not path.stat().st_size:
            raise _Broken("is empty") from None
        raise _Broken(f"is not JSON, or cut off: {error.msg} at line {error.lineno}, column {error.colno}") from None
    if not isinstance(content, dict):
        raise _Broken(f"has to hold an object, and holds {quoted(content)}")
    return content


def _check_number(value: Any, name: str) -> None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return
    if isinstance(value, list) and value and all(isinstance(each, int) and each >= 0 for each in value):
        return  # Some families give a number for every layer.
    raise _Broken(f"says {name} is {quoted(value)}: it has to be a whole number of at least 1")


def _check_weights(path: Path) -> None:
    if path.is_dir():
        raise _Broken("is a directory, where a file of weights should be")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > HEADER_LIMIT:
                raise _Broken("is empty" if not size else "is no safetensors file")
            if size < 8 + length:
                raise _Broken(f"is cut off: {size} bytes, of which its header alone takes {8 + length}")
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except OSError as error:
        raise _Broken(f"cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError, TypeError, KeyError, IndexError, AttributeError):
        raise _Broken("is no safetensors file: its header cannot be read") from None
    whole = 8 + length + max(ends, default=0)
    if size < whole:
        raise _Broken(f"is cut off: {size} of {whole} bytes")


def _check_index(path: Path) -> None:
    shards = _object(path).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise _Broken("has no weight_map of names and files")
    missing = sorted({shard for shard in shards.values() if not (path.parent / shard).exists()})
    if missing and not any((path.parent / shard).exists() for shard in shards.values()):
        # Left over from before the weights were joined or converted: mlx-lm reads what lies there.
        log.warning("%s names files that are not there (%s): the weights beside it are read.", path, missing[0])
    elif missing:
        listed = ", ".join(missing[:SMALL]) + (", …" if len(missing) > SMALL else "")
        raise _Broken(f"names {listed}, which {'is' if len(missing) == 1 else 'are'} not there")


def _check_tokenizer(path: Path) -> None:
    model = _object(path).get("model")
    if not isinstance(model, dict):
        raise _Broken("holds no tokenizer: it has no model")


def _check_generation(path: Path) -> None:
    """Its end tokens end rows, and mlx-lm passes over a file that it cannot read."""
    ends = _object(path).get("eos_token_id")
    listed = ends if isinstance(ends, list) else [ends]
    if not all(end is None or (isinstance(end, int) and not isinstance(end, bool)) for end in listed):
        raise _Broken(f"says eos_token_id is {quoted(ends)}: it has to be a token id or a list of them")
