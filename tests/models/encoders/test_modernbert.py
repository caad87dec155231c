"""ModernBERT's windows, against attention spelt out token by token."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from rollout_server.models.encoders.modernbert import LOCAL, WIDE, Attention, Blocks, ModernBertArgs, window
from tests.support.golden_encoders import opened, passages
from tests.support.numbers.bounds import Network, assert_near

NETWORK = Network(3, 24, 3)
REACH = 4
"""Half of the checkpoint's `local_attention`."""


def arguments(**changed: object) -> ModernBertArgs:
    fields: dict[str, object] = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "hidden_activation": "gelu",
        "max_position_embeddings": 1000,
        "norm_eps": 1e-5,
        "norm_bias": False,
        "pad_token_id": 0,
        "attention_bias": False,
        "mlp_bias": False,
        "layer_types": [LOCAL],
        "rope_parameters": {LOCAL: {"rope_theta": 100.0}},
        "local_attention": 2 * REACH,
        "classifier_pooling": "cls",
        "classifier_bias": False,
        "classifier_activation": "gelu",
    }
    return ModernBertArgs(**(fields | changed))  # type: ignore[arg-type]


def test_positions_are_turned_by_theta(tmp_path: Path) -> None:
    """The pair (i, i + d/2) of a head by position / theta^(2i/d), in float64."""
    attention = Attention(arguments(), LOCAL)
    x = np.random.default_rng(0).standard_normal((1, 2, 30, 8)).astype(np.float32)
    angles = np.arange(30)[:, None] / 100.0 ** (np.arange(0, 8, 2) / 8)
    first, second = x[..., :4], x[..., 4:]
    turned = first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)
    found = np.array(attention._turned(mx.array(x)))
    assert_near(found, np.concatenate(turned, axis=-1), NETWORK.of_logits(x, 30))


@pytest.mark.parametrize("width", [3, REACH + 1, REACH + 2, WIDE * REACH - 1, WIDE * REACH, 23, 48])
def test_a_local_layer_sees_its_window(width: int, tmp_path: Path) -> None:
    model = opened("modernbert/embed", tmp_path)
    layer = next(layer for kind, layer in zip(model.body._kinds, model.body.layers, strict=True) if kind == LOCAL)
    x = mx.random.normal((1, width, 16), key=mx.random.key(3))
    qkv = np.array(layer.attn.Wqkv(x)).reshape(width, 3, 2, 8)
    q, k = (np.array(layer.attn._turned(mx.array(qkv[None, :, part].swapaxes(1, 2))))[0] for part in (0, 1))
    expected = np.zeros((width, 2, 8))
    for head in range(2):
        for i in range(width):
            seen = [j for j in range(width) if abs(i - j) <= REACH]
            scores = np.exp([float(q[head, i] @ k[head, j]) / 8**0.5 for j in seen])
            expected[i, head] = scores / scores.sum() @ qkv[seen, 2, head]
    wanted = np.array(layer.attn.Wo(mx.array(expected.reshape(1, width, 16).astype(np.float32))))
    found = np.array(layer.attn(x, window(None, width, REACH)))
    assert_near(found, wanted, NETWORK.of_logits(wanted, width))


def test_padding_further_away_than_a_window_is_finite_and_changes_nothing(tmp_path: Path) -> None:
    model = opened("modernbert/embed", tmp_path)
    (passage,) = passages(model, 6)
    padded = mx.array([[*passage.ids, *[0] * 40], [*passage.ids, *range(4, 44)]])
    states = np.array(model.body(padded, None, mx.array([6, 46])))
    assert np.isfinite(states).all()
    alone = np.array(model.body(mx.array([passage.ids])))[0]
    assert_near(states[0, :6], alone, NETWORK.of_logits(alone, 46))
    assert np.abs(states[1, :6] - alone).max() > 0.01


@pytest.mark.parametrize("lengths", [None, [33, 1, 20], [17, 33, 32]])
def test_blocks_give_what_a_mask_gives(lengths: list[int] | None) -> None:
    width = 33
    kept = None if lengths is None else mx.arange(width) < mx.array(lengths)[:, None]
    q, k, v = (mx.random.normal((3, 2, width, 8), key=mx.random.key(seed)) for seed in range(3))
    found = np.array(Blocks.of(kept, width, REACH)(q, k, v))
    columns = np.arange(width)
    away = np.abs(columns[:, None] - columns[None])
    tokens = np.ones((3, width), bool) if kept is None else np.array(kept)
    seen = (away <= REACH) & (tokens[:, None] | (away == 0))
    scores = np.where(seen[:, None], np.array(q @ k.swapaxes(-1, -2)) / 8**0.5, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    expected = (weights / weights.sum(axis=-1, keepdims=True)) @ np.array(v)
    assert_near(found, expected.swapaxes(1, 2).reshape(3, width, 16), NETWORK.of_logits(expected, width))
