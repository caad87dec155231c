"""Where pictures stand in a sequence, and what follows from it, against the slow and obvious."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rollout_server.engine.sight.sight import Sight, sight_of
from rollout_server.errors import InvalidField
from rollout_server.text.pictures.picture import Picture
from tests.support.pictures.seeing import opened

MARK = 7


class Family:
    """Placeholders on their own row: three positions each, as a grid of one row of patches has them."""

    placeholder = MARK
    axes = (0, 1, 2)

    def __init__(self, both: bool) -> None:
        self.sees_both_ways = both

    def tokens(self, grid: tuple[int, ...]) -> int:
        return grid[0]

    def positions(self, ids: list[int], grids: list[tuple[int, ...]]) -> np.ndarray | None:
        return None


def picture(count: int, name: str = "a") -> Picture:
    return Picture(f"sha256:{name}", b"", (0,), (count,), count)


def sight(ids: list[int], *shown: Picture, both: bool = False) -> Sight:
    return sight_of(ids, shown, Family(both), lambda _: None)  # type: ignore[arg-type, return-value]


IDS = [1, 2, MARK, MARK, MARK, 3, 4, MARK, MARK, 5, 6]


def test_keys_tell_pictures_apart_and_leave_text_alone() -> None:
    one = sight(IDS, picture(3), picture(2, "b"))
    other = sight(IDS, picture(3), picture(2, "c"))
    assert one.key_of(IDS)[:7] == other.key_of(IDS)[:7] and one.key_of(IDS)[7] != other.key_of(IDS)[7]
    assert [key for key, id in zip(one.key_of(IDS), IDS, strict=True) if id != MARK] == [1, 2, 3, 4, 5, 6]
    assert min(one.key_of(IDS)[2:5]) > 2**40
    # What is sampled behind the pictures is text, whatever it looks like.
    assert one.key_of([*IDS, MARK])[-1] == MARK
    for length in range(len(IDS)):
        assert one.key_of(IDS[:length]) == one.key_of(IDS)[:length]


def test_shown_is_what_stands_between_two_columns() -> None:
    found = sight(IDS, picture(3), picture(2, "b"))
    for at in range(len(IDS)):
        for count in range(len(IDS) - at + 1):
            columns = [int(column) for *_, own in found.shown(at, count) for column in own]
            assert columns == [at + index for index, id in enumerate(IDS[at : at + count]) if id == MARK]
            assert sum(stop - start for _, start, stop, _ in found.shown(at, count)) == len(columns)


@pytest.mark.parametrize("both", [False, True])
def test_a_picture_is_cut_by_no_chunk_where_its_tokens_see_each_other(both: bool) -> None:
    found = sight(IDS, picture(3), picture(2, "b"), both=both)
    inside = {3: (2, 5), 4: (2, 5), 8: (7, 9)} if both else {}
    for column in range(len(IDS) + 1):
        begin, end = inside.get(column, (column, column))
        assert found.before(column) == begin
        assert found.chunk(0, column) == end
    blocks = found.blocks(0, len(IDS))
    picture_of = dict.fromkeys((2, 3, 4), (2, 5)) | dict.fromkeys((7, 8), (7, 9)) if both else {}
    assert [tuple(map(int, seen)) for seen in blocks.T] == [picture_of.get(at, (0, 0)) for at in range(len(IDS))]
    for at in range(len(IDS)):
        assert np.array_equal(found.blocks(at, 3)[:, : len(IDS) - at], blocks[:, at : at + 3])


def test_pictures_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InvalidField, match="5 placeholders"):
        sight(IDS[:5], picture(3), picture(2, "b"))
    with pytest.raises(InvalidField, match="together"):
        sight([1, MARK, 2, MARK, 3], picture(2), both=True)
    assert sight([1, MARK, 2, MARK, 3], picture(2)).end == 4


def test_positions_go_on_behind_the_pictures_whatever_is_sampled_there() -> None:
    with opened("qwen2_5_vl") as seeing:
        conversation, eyes = seeing.conversations["two"], seeing.model.eyes
        assert eyes is not None
        found = eyes.sight(conversation.ids, conversation.pictures)
        assert found is not None and found.delta < 0
        longer = [*conversation.ids, eyes.family.placeholder, 5]
        text = [*conversation.ids, 5, 5]
        expected = eyes.family.positions(text, [each.grid for each in conversation.pictures])
        assert expected is not None
        again = eyes.sight(longer, conversation.pictures)
        assert again is not None
        assert np.array_equal(again.positions(0, len(longer)), expected)
        for at in range(0, len(longer) - 1, 3):
            assert np.array_equal(again.positions(at, 2), expected[:, at : at + 2])
        assert replace(found, pictures=()).delta == again.delta
