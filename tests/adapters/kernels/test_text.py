"""Under which names MLX compiles kernels."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from adapters.kernels.text import ByAddressSpace, Launch


def test_on_metal_few_elements_and_many_are_kernels_of_their_own() -> None:
    made: list[str] = []

    def named(kind: str) -> Launch:
        made.append(kind)

        def launch(*, inputs: Sequence[mx.array], times: int) -> list[mx.array]:
            return [array * times for array in inputs]

        return launch

    kernel = ByAddressSpace(named)
    for rows in (3, 64, 7, 8, 3):
        few, many = kernel(inputs=[mx.ones(rows), mx.ones(1000)], times=2)
        assert (few.size, many.size, few[0].item()) == (rows, 1000, 2)
    assert made == ["_0", ""]
