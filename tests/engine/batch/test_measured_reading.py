"""What reading costs is measured before the first turn: few chunks, within their memory."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from adapters.placement import BASE_SET
from rollout_server.engine.batch.measured_reading import FIRST, GROWTH, cells_of, readings
from rollout_server.engine.kv_cache.padded import PaddedKV
from rollout_server.engine.kv_cache.sizes import padded
from rollout_server.engine.messages.control import Stop
from rollout_server.engine.model.resident import ResidentModel
from tests.support.engine.driver import Driver


@pytest.mark.parametrize("most", [1, 5, FIRST, 200, 5000])
def test_chunks_grow_to_the_most_there_is(base: Driver, most: int) -> None:
    stores: list[PaddedKV] = []
    lengths: list[int] = []

    def make() -> PaddedKV:
        stores.append(base.model.make_padded())
        return stores[-1]

    def forward(tokens: mx.array, layers: list[Any]) -> mx.array:
        lengths.append(tokens.shape[1])
        return base.model.forward(tokens, layers)

    routed: list[Sequence[int]] = []

    def route(slots: Sequence[int]) -> None:
        routed.append(slots)
        base.policies.router(BASE_SET)(slots)

    found = readings(forward, make, route, most)
    assert [tokens for tokens, _ in found] == sorted({tokens for tokens, _ in found})
    assert all(0 < tokens <= most and seconds > 0 for tokens, seconds in found)
    assert found[0][0] == min(most, FIRST) and all(b <= GROWTH * a for (a, _), (b, _) in itertools.pairwise(found))
    # A GPU reads few lengths.
    assert found[-1][0] <= max(lengths) <= padded(found[-1][0]) and len(routed) == len(lengths)
    assert stores[0].allocated_cells <= cells_of(most) + stores[0].capacity * 64


def test_both_terms_are_known_before_the_first_turn(bare_model: Callable[[str], ResidentModel], qwen: Path) -> None:
    driver = Driver.start(qwen, bare_model("qwen3"), clock=time.perf_counter)
    assert not driver.reading_costs.known
    driver.send(Stop())
    driver.engine.run()
    assert driver.reading_costs.known and driver.reading_costs.of(100) > 0


def test_nothing_is_measured_where_that_would_not_fit(bare_model: Callable[[str], ResidentModel], qwen: Path) -> None:
    driver = Driver.start(qwen, bare_model("qwen3"), clock=time.perf_counter)
    driver.set_kv_limit(8)
    driver.learn_costs()
    assert not driver.reading_costs.known
