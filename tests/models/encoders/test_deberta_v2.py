"""What positions add to DeBERTa's attention, against its definition pair by pair; and its padding."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from rollout_server.engine.model.checkpoint.files import read_config
from rollout_server.engine.model.checkpoint.meaning import meaning_of
from rollout_server.models.encoders.deberta_v2 import DebertaV2Args, log_bucket
from rollout_server.models.encoders.families import ENCODERS
from tests.support.golden_encoders import copied, opened, passages
from tests.support.numbers.bounds import Network, assert_near

NETWORK = Network(2, 24, 3)


def arguments(directory: Path) -> DebertaV2Args:
    return ENCODERS["deberta-v2"].arguments_of(meaning_of(read_config(directory)).fields)


def test_near_distances_have_a_bucket_each_and_far_ones_share_it() -> None:
    distances = np.arange(-511, 512)
    buckets = log_bucket(distances, 256, 512)
    near = np.abs(distances) <= 128
    np.testing.assert_array_equal(buckets[near], distances[near])
    np.testing.assert_array_equal(buckets, -buckets[::-1])
    assert np.all(np.diff(buckets) >= 0)
    assert buckets.max() == 255 and len(np.unique(buckets)) < len(distances)


def test_a_logarithm_that_is_a_whole_number_stays_in_its_bucket() -> None:
    """8 buckets, half of them 4, and the furthest distance 32: log 8 / log 8 · 3 is 3 exactly."""
    assert log_bucket(np.array([32, 33, -32]), 8, 33).tolist() == [7, 8, -7]


@pytest.mark.parametrize("checkpoint", ["deberta-v2", "deberta-v3"])
@pytest.mark.parametrize("width", [1, 2, 9, 40])
def test_what_positions_add_is_their_definition(checkpoint: str, width: int, tmp_path: Path) -> None:
    """Content to position and position to content, one pair of tokens after another."""
    model = opened(f"{checkpoint}/embed", tmp_path)
    args, encoder = arguments(tmp_path), model.module.encoder
    attention = encoder.layer[0].attention["self"]
    heads, size = args.num_attention_heads, args.hidden_size // args.num_attention_heads
    q, k = (mx.random.normal((2, heads, width, size), key=mx.random.key(seed)) for seed in (1, 2))
    found = np.array(attention._bias(q, k, *encoder._positions(width, 1)))
    table = encoder["LayerNorm"](encoder.rel_embeddings.weight)
    shared = "pos_key_proj" not in attention
    keys, queries = (
        np.array(attention[name](table)).reshape(-1, heads, size)
        for name in (("key_proj", "query_proj") if shared else ("pos_key_proj", "pos_query_proj"))
    )
    expected = np.zeros_like(found)
    for i in range(width):
        for j in range(width):
            row = int(args.rows(width)[i - j + width - 1])
            for head in range(heads):
                expected[:, head, i, j] = np.array(q)[:, head, i] @ keys[row, head]
                expected[:, head, i, j] += np.array(k)[:, head, j] @ queries[row, head]
    assert_near(found, expected, NETWORK.of_logits(expected, width))


@pytest.mark.parametrize("checkpoint", ["deberta-v2", "deberta-v3"])
def test_a_table_for_each_row_gives_what_one_for_all_gives(checkpoint: str, tmp_path: Path) -> None:
    model = opened(f"{checkpoint}/embed", tmp_path)
    ids = mx.array([list(passage.ids) for passage in passages(model, 20, 20, 20)])
    one, each = (np.array(model.body(ids, mixed=mixed)) for mixed in (False, True))
    assert_near(one, each, NETWORK.of_logits(one, 20))


def test_what_stands_behind_a_sequence_does_not_reach_its_convolution(tmp_path: Path) -> None:
    model = opened("deberta-v2/embed", tmp_path)
    (passage,) = passages(model, 21)
    alone = np.array(model.body(mx.array([passage.ids])))[0]
    for behind in (0, 9):
        padded = np.array(model.body(mx.array([[*passage.ids, *[behind] * 11]]), None, mx.array([21])))[0, :21]
        assert_near(padded, alone, NETWORK.of_logits(alone, 32))


def test_without_buckets_every_distance_has_a_row(tmp_path: Path) -> None:
    args = arguments(copied("deberta-v3/embed", tmp_path, position_buckets=-1))
    assert args.span == args.max_position_embeddings
    np.testing.assert_array_equal(args.rows(20), np.arange(-19, 20) + args.span)
