"""A model that is cut serves only if it computes what it does uncut, for a short prompt and for a long one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.utils import load_model

from rollout_server.engine.ranks.check import LENGTHS, check_cut
from rollout_server.engine.ranks.ranks import Ranks
from rollout_server.errors import EngineUnavailable
from tests.support import tiny_models

CONTEXT = 4096
Opened = Callable[..., nn.Module]


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    """A small gpt_oss, whose first block reads no further back than its window."""

    def open_model(**overrides: Any) -> nn.Module:
        folder = tmp_path / "-".join(map(str, overrides.values() or ["plain"]))
        return load_model(tiny_models.build("gpt_oss", folder, **overrides))[0]

    return open_model


@pytest.fixture
def alone() -> Ranks:
    return Ranks(mx.distributed.init())


def check(module: nn.Module, whole: nn.Module, ranks: Ranks, context: int = CONTEXT) -> None:
    check_cut(module, lambda: whole, ranks, tiny_models.VOCAB_SIZE, context)


def test_one_that_is_right_is_tried_with_both_lengths(
    opened: Opened, alone: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    check(opened(), opened(), alone)
    tried = [record.args[1] for record in caplog.records if "agree on a prompt" in record.message and record.args]
    assert LENGTHS == (8, 3000) and tuple(tried) == LENGTHS


def test_one_that_is_wrong_is_refused(opened: Opened, alone: Ranks) -> None:
    wrong = opened()
    wrong.model.layers[0].self_attn.o_proj.weight *= 1.001
    with pytest.raises(EngineUnavailable, match=r"prompt of 8 tokens rank 0 has .* without --tensor-parallel"):
        check(wrong, opened(), alone)


@pytest.mark.long
def test_one_that_is_wrong_in_long_prompts_only_is_refused(opened: Opened, alone: Ranks) -> None:
    wider = opened(sliding_window=32)
    with pytest.raises(EngineUnavailable, match="prompt of 3000 tokens"):
        check(wider, opened(), alone)
    # A context that holds no longer prompt asks for none.
    check(wider, opened(), alone, context=9)


def test_ranks_whose_logits_differ_are_refused(opened: Opened, alone: Ranks) -> None:
    """Behind the first block, which is all that each compares with the whole."""

    class Two(Ranks):
        def every(self, values: mx.array) -> Any:
            own = super().every(values)
            other = own + 1.0 if values.ndim == 1 and values.size == tiny_models.VOCAB_SIZE else own
            return mx.concatenate([mx.array(own), mx.array(other)])

    module = opened()
    with pytest.raises(EngineUnavailable, match=r"rank \d has .* in its logits"):
        check(module, opened(), Two(mx.distributed.init()))
