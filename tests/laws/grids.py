"""Which corners of a grid `make test` runs: the others are left to `make test-long`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

import pytest


def corners(*axes: Sequence[Any], together: int = 1) -> list[Any]:
    """Every case of the grid, for `parametrize`: `make test` runs as few as meet each value of each axis, or with
    `together=2` each two values of two axes; the others are marked `long`."""
    cases = list(product(*(range(len(axis)) for axis in axes)))
    chosen: set[tuple[int, ...]] = set()
    unmet = {part for case in cases for part in combinations(enumerate(case), together)}
    while unmet:
        best = max(cases, key=lambda case: len(unmet.intersection(combinations(enumerate(case), together))))
        chosen.add(best)
        unmet.difference_update(combinations(enumerate(best), together))
    return [
        pytest.param(
            *(axis[at] for axis, at in zip(axes, case, strict=True)), marks=() if case in chosen else pytest.mark.long
        )
        for case in cases
    ]


def some_long(cases: Sequence[Any], *kept: Any) -> list[Any]:
    """The cases of a list, for `parametrize`: all but those that are kept are marked `long`. A case of several names is
    a tuple."""
    return [
        case if case in kept else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.long)
        for case in cases
    ]
