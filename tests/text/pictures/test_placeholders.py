"""A picture's placeholders in a text, as transformers' processors write them: by their own function where it can be
imported without torch, else as it is defined."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

from rollout_server.text.pictures.picture import Picture
from rollout_server.text.pictures.placeholders import framed, in_rows, in_tiles, repeated

GRIDS = ((1, 1), (2, 1), (1, 3), (3, 2))


def picture(tokens: int, *grid: int) -> Picture:
    return Picture("sha256:" + "0" * 64, b"", (0,), grid, tokens)


def test_the_mark_is_repeated() -> None:
    placeholders = repeated("<image>")
    found = placeholders.expand("a<image>b<image>", [picture(2, 1, 2, 2), picture(3, 1, 2, 2)])
    assert found == "a<image><image>b<image><image><image>"
    assert placeholders.expand("nothing to see", []) == "nothing to see"


@pytest.mark.parametrize("text", ["none", "<image> and <image>", "<image><image><image>"])
def test_places_and_pictures_have_to_agree(text: str) -> None:
    with pytest.raises(ValueError, match=rf"{text.count('<image>')} places for pictures .* there is 1 picture"):
        repeated("<image>").expand(text, [picture(2, 1, 2, 2)])


def test_what_stands_for_a_part_of_a_picture_is_no_text() -> None:
    with pytest.raises(ValueError, match="stands for a part of a picture"):
        framed("<begin>", "<part>", "<end>").expand("<part><begin>", [picture(2, 4, 4)])


def test_a_frame_is_a_paragraph_of_its_own() -> None:
    found = framed("<begin>", "<part>", "<end>").expand("a <begin>b", [picture(3, 8, 8)])
    assert found == "a \n\n<begin><part><part><part><end>\n\nb"


@pytest.mark.parametrize("merge", [1, 2])
@pytest.mark.parametrize("grid", GRIDS)
def test_rows_end_in_marks_of_their_own(grid: tuple[int, int], merge: int) -> None:
    rows, columns = grid
    tokens = (["[IMG]"] * columns + ["[B]"]) * rows
    tokens[-1] = "[E]"
    shown = picture(rows * columns, rows * merge, columns * merge)
    assert in_rows("[IMG]", "[B]", "[E]", merge).expand("[IMG] what", [shown]) == "".join(tokens) + " what"


@pytest.mark.parametrize("grid", [(0, 0), *GRIDS])
def test_idefics_writes_tiles_as_its_processor_does(grid: tuple[int, int]) -> None:
    self: Any = SimpleNamespace(
        fake_image_token="<fake>", image_token="<image>", global_image_tag="<whole>", image_seq_len=3
    )
    theirs = Idefics3Processor.replace_image_token(self, {"rows": [[grid[0]]], "cols": [[grid[1]]]}, 0)
    shown = picture((grid[0] * grid[1] + 1) * 3, *grid)
    assert in_tiles("<image>", "<fake>", "<whole>", 3).expand("see <image>.", [shown]) == f"see {theirs}."
