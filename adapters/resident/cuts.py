"""Layers of which each of several ranks holds a part, and the part of an adapter that belongs to it.

A layer whose outputs are cut takes A whole, and its own columns of B and of the gain. One whose inputs are cut takes
its own columns of A, and B and the gain whole: its low-rank product is then a part of the same sum as the base's.
Neither needs one more collective in a forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from adapters.prepare import HostFactors, PreparedBundle
from adapters.spec import ExpertsShape

Side = Literal["outputs", "inputs"]


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """Which side of a layer is cut into equal parts, one after another, and over whom."""

    side: Side
    group: mx.distributed.Group

    def own(self, count: int) -> slice:
        """Which of so many values of that side are this rank's."""
        each = count // self.group.size()
        return slice(self.group.rank() * each, (self.group.rank() + 1) * each)

    def shape(self, whole: tuple[int, int]) -> tuple[int, int]:
        """(out, in) of this rank's part of a layer."""
        out, width = whole
        if self.side == "outputs":
            out //= self.group.size()
        else:
            width //= self.group.size()
        return ExpertsShape(out, width, whole.experts) if isinstance(whole, ExpertsShape) else (out, width)

    def factors(self, whole: HostFactors) -> HostFactors:
        """This rank's part of A and B."""
        if self.side == "outputs":
            return replace(whole, b=whole.b[..., self.own(whole.b.shape[-1])])
        return replace(whole, a=whole.a[..., self.own(whole.a.shape[-1])])

    def gain(self, whole: NDArray[Any]) -> NDArray[Any]:
        """This rank's part of a value for each output."""
        return whole[self.own(len(whole))] if self.side == "outputs" else whole

    def placed(self, own: NDArray[Any], out: int) -> NDArray[np.float32]:
        """What this rank knows of the outputs [out], to be summed over ranks: its own outputs, or its part of the sum
        of each."""
        if self.side == "inputs":
            return own.astype(np.float32)
        values = np.zeros(out, np.float32)
        values[self.own(out)] = own
        return values


def own_part(prepared: PreparedBundle, cuts: Mapping[str, Cut]) -> PreparedBundle:
    """A version as this rank's layers take it. What a gain is made of stays whole, since every rank finds all gains."""
    factors = {path: cuts[path].factors(of) if path in cuts else of for path, of in prepared.factors.items()}
    return replace(prepared, factors=factors)


def summed(
    cuts: Sequence[Cut | None], values: Sequence[NDArray[Any]], outs: Sequence[int]
) -> list[NDArray[np.float64]]:
    """A value for each output of several layers, [out] each, from what each rank knows of them, by one sum over ranks.
    Those of a layer that is whole are there already. Every rank calls it with the same layers."""
    group = next((cut.group for cut in cuts if cut is not None), None)
    if group is None:
        return [value.astype(np.float64) for value in values]
    parts = [cut.placed(value, out) for cut, value, out in zip(cuts, values, outs, strict=True) if cut is not None]
    whole = np.array(mx.distributed.all_sum(mx.array(np.concatenate(parts)), group=group), dtype=np.float64)
    found = iter(np.split(whole, np.cumsum([len(part) for part in parts[:-1]], dtype=int)))
    return [value.astype(np.float64) if cut is None else next(found) for cut, value in zip(cuts, values, strict=True)]
