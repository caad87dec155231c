"""What `make test` runs of a grid meets every value, and what it leaves out is run by `make test-long`."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import pytest

from tests.laws.grids import corners, some_long

AXES: list[list[Any]] = [["a", "b", "c", "d"], [1, 2, 3], [None, {}], [True, False]]


@pytest.mark.parametrize("together", [1, 2, 3, 4])
def test_every_value_is_met_and_nothing_is_lost(together: int) -> None:
    cases = corners(*AXES, together=together)
    assert [case.values for case in cases] == list(product(*AXES))
    chosen = [case.values for case in cases if not case.marks]
    assert {mark.name for case in cases for mark in case.marks} <= {"long"}
    for places in combinations(range(len(AXES)), together):
        met = [[case[place] for place in places] for case in chosen]
        assert all(list(wanted) in met for wanted in product(*(AXES[place] for place in places)))
    assert len(chosen) == {1: 4, 4: 48}.get(together, len(chosen)) and (together == 4 or len(chosen) < 48)


def test_what_is_not_kept_is_long() -> None:
    kept, left, several = some_long(["a", "b", (1, 2)], "a")
    assert kept == "a" and left.values == ("b",) and several.values == (1, 2)
    assert all([mark.name for mark in case.marks] == ["long"] for case in (left, several))
