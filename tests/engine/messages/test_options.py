"""What follows from the facts of a model, without one."""

from __future__ import annotations

from typing import Any

import pytest

from rollout_server.engine.messages.options import JOINED_KV_SPARE, KV_BUCKET, Embedding, ModelInfo


def info_of(**fields: Any) -> ModelInfo:
    given: dict[str, Any] = {
        "id": "tiny",
        "digest": "sha256:0",
        "model_type": "qwen3",
        "vocab_size": 100,
        "max_model_len": 64,
        "dtype": "float32",
        "quantization": None,
        "eos_token_ids": (1,),
        "parameters": 10,
        "layers": {},
        "kv_bytes_per_token": 10,
        "kv_memory": 10_000,
        "cache": "slots",
        "max_batch": 4,
        "device": "cpu",
    }
    return ModelInfo(**(given | fields))


@pytest.mark.parametrize(
    ("tokens", "columns"), [(1, KV_BUCKET), (KV_BUCKET - 1, KV_BUCKET), (KV_BUCKET, 2 * KV_BUCKET)]
)
def test_a_row_takes_whole_buckets_with_one_column_to_spare(tokens: int, columns: int) -> None:
    """Scatter checks no bounds, so that a row always has a column more than its tokens."""
    assert info_of().row_bytes(tokens) == 10 * columns


def test_other_caches_take_their_spare_and_what_no_token_adds_to() -> None:
    assert info_of(cache="batch", kv_bytes_per_row=7).row_bytes(5) == 10 * (5 + JOINED_KV_SPARE) + 7
    assert info_of(kv_bytes_per_row=7).row_bytes(5) == 10 * KV_BUCKET + 7


@pytest.mark.parametrize(
    ("pad", "tokens", "at"),
    [
        (None, (5, 0, 0), 2),
        (0, (5, 6, 0, 0), 1),
        (0, (0, 5), 1),
        (0, (5, 0, 6), 2),
        (0, (0, 0), 0),
        (0, (5,), 0),
    ],
)
def test_a_head_is_read_at_the_last_token_that_is_no_padding(pad: int | None, tokens: tuple[int, ...], at: int) -> None:
    assert info_of(pad_token_id=pad).head_position(tokens) == at


def test_a_head_scores_like_the_base_s_only_with_its_task_and_as_many_labels() -> None:
    base = info_of(task="classify", labels=("good", "bad"))
    assert base.scores_like("classify", 2)
    assert not base.scores_like("classify", 3)
    assert not base.scores_like("token_classify", 2)
    assert not base.scores_like(None, 2)


def test_only_a_model_that_scores_tells_heads_a_task() -> None:
    wide = Embedding(width=16)
    scorer = info_of(task="token_classify", encoder=True, embedding=wide).scoring
    assert (scorer.width, scorer.task, scorer.whole) == (16, "token_classify", True)
    for task in ("generate", "embed"):
        assert info_of(task=task, embedding=wide).scoring.task is None
