"""Flat rows → rectangles [R, L], the shape a trainer's forward pass takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

Side = Literal["left", "right"]

Rows = Sequence[tuple[np.ndarray, np.ndarray]]
"""Per row: prompt token ids, completion token ids; int32."""


def pad(
    rows: Rows, per_token: Mapping[str, np.ndarray], *, pad_token_id: int, prompt_padding: Side
) -> dict[str, np.ndarray]:
    """`input_ids`, the masks and `position_ids` of the rows, and each flat [N] array of `per_token` laid out likewise.

    All results are [R, L]. Padding is `pad_token_id` in `input_ids` and 0 elsewhere."""
    prompt_lengths = np.array([len(prompt) for prompt, _ in rows], np.int64)
    lengths = np.array([len(completion) for _, completion in rows], np.int64)
    starts = np.full(len(rows), prompt_lengths.max(initial=0)) if prompt_padding == "left" else prompt_lengths
    width = int((starts + lengths).max(initial=0))
    column = np.arange(width)[None, :]
    start, end = starts[:, None], (starts + lengths)[:, None]
    attended = (column >= start - prompt_lengths[:, None]) & (column < end)
    completion = (column >= start) & (column < end)

    def place(where: np.ndarray, flat: np.ndarray, fill: int = 0) -> np.ndarray:
        placed = np.full(where.shape, fill, flat.dtype)
        # a boolean mask is read row by row, which is the order of the flat array
        placed[where] = flat
        return placed

    ids = [part for row in rows for part in row]
    flat_ids = np.concatenate(ids).astype(np.int32, copy=False) if ids else np.zeros(0, np.int32)
    return {
        "input_ids": place(attended, flat_ids, pad_token_id),
        "attention_mask": attended.astype(np.int32),
        "position_ids": np.maximum(np.cumsum(attended, axis=1, dtype=np.int32) - 1, 0),
        "completion_mask": completion.astype(np.int32),
        **{name: place(completion, flat) for name, flat in per_token.items()},
    }
