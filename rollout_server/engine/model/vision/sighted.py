"""A decoder that is given what a tower made of pictures: embeddings in the place of placeholders, vectors added behind
its first layers, and rotary positions on three axes."""

from __future__ import annotations

import logging
from operator import attrgetter
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.models.base import create_attention_mask

from rollout_server.engine.model.checkpoint.files import read_config
from rollout_server.engine.model.kv_choice import ChosenStore
from rollout_server.engine.model.vision.load import read_vision
from rollout_server.engine.model.vision.reader import read_pictures
from rollout_server.engine.sight.features import Eyes
from rollout_server.engine.sight.seen import Seen
from rollout_server.errors import EngineUnavailable
from rollout_server.models.vision.family import VisionFamily

log = logging.getLogger("rollout_server.engine.model")


class AxesRoPE(nn.Module):
    """M-RoPE (arXiv:2409.12191): each pair of a head's values is turned by one of three positions. Where one number
    says all three, as of text, it is the RoPE that it replaces."""

    def __init__(self, plain: nn.Module, axes: tuple[int, ...]) -> None:
        super().__init__()
        self._plain = plain
        self._axes = mx.array(axes, dtype=mx.int32)
        self._frequencies = mx.array(frequencies_of(plain, len(axes)))

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """x [B, heads, N, head size]; offset int32 [3, B, N], or what `nn.RoPE` takes."""
        if isinstance(offset, int) or offset.ndim < 3:
            return self._plain(x, offset=offset)
        positions = mx.take(offset, self._axes, axis=0).astype(mx.float32).transpose(1, 2, 0)
        angles = (positions * self._frequencies)[:, None]
        cosine, sine = mx.cos(angles), mx.sin(angles)
        width = 2 * self._axes.size
        first, second = mx.split(x[..., :width].astype(mx.float32), 2, axis=-1)
        turned = mx.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
        return mx.concatenate([turned.astype(x.dtype), x[..., width:]], axis=-1)


def frequencies_of(plain: nn.Module, pairs: int) -> np.ndarray:
    """float32 [pairs] radians a position. Raises `ValueError` for a RoPE that is not made of them alone."""
    if getattr(plain, "traditional", False) or getattr(plain, "_scale", 1.0) != 1.0:
        raise ValueError(f"positions on three axes cannot be given to a {type(plain).__name__} that is scaled so")
    if "_freqs" in plain:
        found = 1.0 / np.array(plain["_freqs"], dtype=np.float32)
    elif type(plain) is nn.RoPE and plain.scale == 1.0:
        exponents = np.arange(0, plain.dims, 2, dtype=np.float32) / np.float32(plain.dims)
        found = (1.0 / np.float32(plain.base) ** exponents).astype(np.float32)
    else:
        raise ValueError(f"positions on three axes cannot be given to a {type(plain).__name__}")
    if len(found) != pairs:
        raise ValueError(f"a head has {len(found)} pairs, and {pairs} have an axis")
    return found


def turn_by_axes(module: nn.Module, axes: tuple[int, ...]) -> None:
    """Gives every layer that turns queries and keys positions on three axes. Raises `ValueError` where one cannot."""
    found = [(path, layer) for path, layer in module.named_modules() if path.rpartition(".")[2] == "rope"]
    if not found:
        raise ValueError("the decoder has no RoPE that could be given positions on three axes")
    module.update_modules(tree_unflatten([(path, AxesRoPE(layer, axes)) for path, layer in found]))


def states_of(module: nn.Module, trunk: str, tokens: mx.array, caches: list[Any], seen: Seen) -> mx.array:
    """tokens int32 [B, N] and what is seen among them → states after the final norm [B, N, width]."""
    body = attrgetter(trunk)(module)
    hidden = seen.into(body.embed_tokens(tokens))
    if not seen.deepstack:
        return body(tokens, cache=caches, input_embeddings=hidden)
    mask = create_attention_mask(hidden, caches[0])
    for number, (layer, cache) in enumerate(zip(body.layers, caches, strict=True)):
        hidden = seen.behind(number, layer(hidden, mask, cache))
    return body.norm(hidden)


def logits_of(module: nn.Module, trunk: str, states: mx.array) -> mx.array:
    """states [B, N, width] after the final norm → logits [B, N, V]."""
    *above, _ = trunk.split(".")
    owner = attrgetter(".".join(above))(module) if above else module
    output = getattr(owner, "lm_head", None)
    return attrgetter(trunk)(module).embed_tokens.as_linear(states) if output is None else output(states)


def read_tower(directory: Path, module: nn.Module) -> VisionFamily | None:
    """The tower beside a decoder, whose layers are made to turn as pictures need it. Raises `EngineUnavailable` where
    one of the two cannot be what it is in transformers."""
    family = read_vision(directory, read_config(directory))
    if family is not None and family.axes is not None:
        try:
            turn_by_axes(module, family.axes)
        except ValueError as error:
            raise EngineUnavailable(f"The model at {directory} could not be loaded: {error}.") from error
    return family


def eyes_of(
    family: VisionFamily | None,
    directory: Path,
    tokenizer: Any,
    module: nn.Module,
    trunk: str,
    store: ChosenStore,
    dtype: mx.Dtype,
) -> Eyes | None:
    """`tokenizer` is the event loop's, on whose side files are read. None where the decoder cannot be given what a
    tower makes, which the log then says."""
    if family is None:
        return None
    if store.kind != "slots" or not trunk or not hasattr(attrgetter(trunk)(module), "embed_tokens"):
        log.warning("This decoder takes no features of pictures here: it is served as a text model and refuses them.")
        return None
    reader = read_pictures(directory, read_config(directory), family, tokenizer)
    return Eyes(family, dtype, store.cell_bytes, reader)
