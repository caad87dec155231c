"""Pieces of a body: kept where they are, and never many times their size."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterable

import numpy as np
import pytest

from rollout_server.http.requests.uploads import PIECE, Pieces


def held(pieces: Iterable[bytes]) -> tuple[Pieces, int]:
    """(All of them, the bytes allocated to hold them.)"""
    kept = Pieces()
    tracemalloc.start()
    try:
        for piece in pieces:
            kept.add(piece)
        return kept, tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("seed", range(5))
def test_pieces_of_any_size_come_out_in_their_order(seed: int) -> None:
    random = np.random.default_rng(seed)
    sent = [random.bytes(int(size)) for size in random.choice([0, 1, 100, PIECE - 1, PIECE, 3 * PIECE], 60)]
    kept = Pieces()
    for number, piece in enumerate(sent):
        kept.add(bytearray(piece) if number % 2 else piece)
    assert kept.length == sum(map(len, sent))
    assert kept.take() == b"".join(sent)
    assert kept.length == 0 and kept.take() == b"", "nothing is left"


def test_a_body_sent_byte_by_byte_takes_about_its_length() -> None:
    kept, allocated = held(bytes([number % 251]) for number in range(300_000))
    assert allocated < 1.5 * kept.length


def test_long_pieces_are_not_copied() -> None:
    sent = [bytes(64 * PIECE) for _ in range(16)]
    kept, allocated = held(sent)
    assert kept.length == 16 * 64 * PIECE and allocated < PIECE
    assert kept.take() == b"".join(sent)
