"""What the engine knows of a family of vision models, whatever its tower computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

Grid = tuple[int, ...]
"""How a picture is cut, in the terms of its family's image processor: (frames, rows, columns) of patches where patches
come one by one, (rows, columns) of patches or of tiles elsewhere."""


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """What a tower makes of one picture."""

    embeddings: mx.array
    """[tokens, hidden], what takes the place of the placeholders' embeddings. A decoder that scales embeddings scales
    these too, and they are already divided by its factor."""
    deepstack: tuple[mx.array, ...] = ()
    """Each [tokens, hidden]: number i is added to the hidden states of these tokens behind decoder layer i."""

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (self.embeddings, *self.deepstack))


class VisionFamily(Protocol):
    """A tower with its weights, and how its tokens stand in the decoder's sequence."""

    @property
    def tower(self) -> nn.Module:
        """The weights that the decoder does not have."""

    @property
    def placeholder(self) -> int:
        """The token id that stands for one feature vector."""

    @property
    def sees_both_ways(self) -> bool:
        """True where the tokens of one picture see each other and not only those before them, in layers with a window
        within this window. Such a picture is read in one chunk."""

    @property
    def axes(self) -> tuple[int, ...] | None:
        """Which of the three positions (0 time, 1 row, 2 column) turns each pair of a head's values, one for each
        frequency of RoPE; None where a token's position is its column."""

    def tokens(self, grid: Grid) -> int:
        """How many placeholders a picture has, in the order of its features. Tokens of text may stand between them, as
        at the end of a row of Pixtral's or between the tiles of Idefics3. Raises `ValueError` for a grid that no
        picture of this family has."""

    def features(self, pixels: mx.array, grid: Grid) -> Features:
        """What one picture gives, whose pixels are what the family's image processor makes."""

    def positions(self, token_ids: Sequence[int], grids: Sequence[Grid]) -> np.ndarray | None:
        """int32 [3, N]: what turns each token along the three axes; None where positions are columns. The token behind
        the last one has the largest position plus one on all three. Raises `ValueError` where placeholders and grids
        disagree."""
