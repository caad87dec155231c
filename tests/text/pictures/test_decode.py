"""Files of pictures: what is read is what transformers reads, and everything else is refused with half a sentence."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from rollout_server.text.pictures.decode import decoded
from tests.support.pictures.files import READABLE, UNREADABLE, drawn, mutated, rotated, saved

LIMIT = 1_000_000


@pytest.mark.parametrize("kind", READABLE)
def test_a_picture_has_the_pixels_that_transformers_loads(kind: str) -> None:
    found = decoded(READABLE[kind], LIMIT)
    wanted = load_image(Image.open(BytesIO(READABLE[kind])))
    assert found.mode == "RGB" and found.size == wanted.size
    assert np.asarray(found).tobytes() == np.asarray(wanted).tobytes()


def test_a_photo_stands_upright() -> None:
    assert decoded(rotated(drawn(40, 24), 6), LIMIT).size == (24, 40)
    assert decoded(rotated(drawn(40, 24), 1), LIMIT).size == (40, 24)


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_is_no_picture_is_refused_with_a_reason(kind: str) -> None:
    data, reason = UNREADABLE[kind]
    with pytest.raises(ValueError, match=reason) as refused:
        decoded(data, LIMIT)
    assert len(str(refused.value)) < 250 and "\n" not in str(refused.value)


def test_the_limit_is_the_last_that_fits() -> None:
    assert decoded(saved(drawn(30, 20)), 600).size == (30, 20)
    with pytest.raises(ValueError, match=r"30 × 20 pixels, and 599 are allowed"):
        decoded(saved(drawn(30, 20)), 599)


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    """Its pixels would fill 10 GB; a limit above them changes nothing, as Pillow has one of its own."""
    for limit in (LIMIT, 10**12):
        with pytest.raises(ValueError, match="pixels"):
            decoded(UNREADABLE["bomb"][0], limit)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "still gif", "bmp", "palette with transparency", "cmyk"])
def test_broken_files_are_refused_and_nothing_else_happens(kind: str) -> None:
    """150 mutations of each, 1,050 in all."""
    generator = np.random.default_rng(len(kind))
    read = refused = 0
    for _ in range(150):
        try:
            image = decoded(mutated(READABLE[kind], generator), LIMIT)
        except ValueError as error:
            assert str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert image.mode == "RGB" and image.width * image.height <= LIMIT
            read += 1
    assert read + refused == 150 and refused > 20
