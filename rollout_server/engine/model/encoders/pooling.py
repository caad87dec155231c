"""How a directory wants an encoder's states made into one vector, as sentence-transformers writes it: modules.json, the
pooling's config.json, and sentence_bert_config.json. A directory without them is pooled by the mean of its tokens, as
sentence-transformers does, and normalised, as every model here is that says nothing."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from rollout_server.engine.model.embedding import MODULES, read_modules
from rollout_server.errors import EngineUnavailable
from rollout_server.models.encoders.attention import tokens_kept
from rollout_server.quoting import quoted

log = logging.getLogger(__name__)

SENTENCE, PROMPTS = "sentence_bert_config.json", "config_sentence_transformers.json"
FLAGS: Mapping[str, str] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Fields of older files → modes of newer ones, in the order in which several are joined."""


@dataclass(frozen=True, slots=True)
class Pooling:
    modes: tuple[str, ...] = ("mean",)
    """Values of `FLAGS`; the vectors of several stand one behind the other."""
    normalise: bool = True
    max_tokens: int | None = None
    """What the directory bounds its inputs to; None where it says nothing."""

    def of(self, states: mx.array, lengths: mx.array | None) -> mx.array:
        """[B, N, width] → float32 [B, modes · width]; int [B] lengths, or None where every column is a token."""
        states = states.astype(mx.float32)
        kept = tokens_kept(lengths, states.shape[1])
        counts = mx.full((states.shape[0],), states.shape[1]) if lengths is None else lengths
        parts = [_pooled(mode, states, kept, counts) for mode in self.modes]
        vectors = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)
        if not self.normalise:
            return vectors
        return vectors / mx.maximum(mx.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _pooled(mode: str, states: mx.array, kept: mx.array | None, counts: mx.array) -> mx.array:
    if mode == "cls":
        return states[:, 0]
    if mode == "lasttoken":
        return mx.take_along_axis(states, (counts - 1)[:, None, None], axis=1)[:, 0]
    if mode == "max":
        return (states if kept is None else mx.where(kept[..., None], states, -mx.inf)).max(axis=1)
    states = states if kept is None else mx.where(kept[..., None], states, 0)
    tokens = counts[:, None].astype(mx.float32)
    if mode == "weightedmean":
        weights = mx.arange(1, states.shape[1] + 1, dtype=mx.float32)[:, None]
        return (states * weights).sum(axis=1) / (tokens * (tokens + 1) / 2)
    return states.sum(axis=1) / (tokens if mode == "mean" else mx.sqrt(tokens))


def read_pooling(directory: Path) -> Pooling:
    """Raises `EngineUnavailable` where the files cannot be read or want something that is not computed here."""
    try:
        return _read(directory)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineUnavailable(
            f"The sentence-transformers files in {directory} cannot be read ({type(error).__name__}: {error})."
        ) from error


def _read(directory: Path) -> Pooling:
    sentence = _object(directory / SENTENCE)
    longest = sentence.get("max_seq_length")
    if sentence.get("do_lower_case"):
        raise EngineUnavailable(f"{directory / SENTENCE} says do_lower_case, and text is tokenised here as it comes.")
    if (prompt := _object(directory / PROMPTS).get("default_prompt_name")) is not None:
        log.warning("%s has a default prompt, %s: it is not put before a text here.", directory, quoted(prompt))

    def refused(kind: str) -> EngineUnavailable:
        return EngineUnavailable(f"{directory / MODULES} has a module of type {kind}, which is not served.")

    modes, normalise = read_modules(directory, _modes, refused)
    return Pooling(modes, normalise, longest)


def _modes(folder: Path) -> tuple[str, ...]:
    config = _object(folder / "config.json")
    given = config.get("pooling_mode")
    if given is None:
        return tuple(mode for flag, mode in FLAGS.items() if config.get(flag)) or ("mean",)
    modes = (given,) if isinstance(given, str) else tuple(str(mode) for mode in given)
    if not modes or set(modes) - set(FLAGS.values()):
        raise EngineUnavailable(
            f"{folder / 'config.json'} says pooling_mode is {' and '.join(modes) or 'nothing'}; known are "
            f"{', '.join(FLAGS.values())}."
        )
    return modes


def _object(path: Path) -> Mapping[str, Any]:
    """A file's object; empty where there is no such file."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} has to hold an object")
    return content
