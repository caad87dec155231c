"""A picture's file → its pixels in red, green and blue, as transformers' `load_image` makes them, or half a sentence on
why not. What a file claims is checked before it is decoded."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Each has a decoder that reads untrusted files everywhere; others stay unopened, whatever Pillow has."""
STILL = frozenset({"MPO"})
"""A photo and its preview, or its two eyes: the first is the picture."""
MODES = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"})
"""Those of which a picture in eight bits a colour is left; the others would turn white in silence."""
SHOWN = 100
"""Characters shown of what a library says."""
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    RuntimeError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
"""What decoders raise for files that are not what they claim to be."""


LYING = frozenset({5, 6, 7, 8})
"""EXIF's orientations under which rows are shown as columns."""


def decoded(data: bytes, most_pixels: int) -> Image.Image:
    """Mode RGB, upright as its EXIF says. Raises `ValueError` with half a sentence."""
    with _checked(data, most_pixels) as opened:
        opened.load()
        upright = ImageOps.exif_transpose(opened)
        return upright.convert("RGB")


def measured(data: bytes, most_pixels: int) -> tuple[int, int]:
    """Width and height of what `decoded` gives, as the head of the file says them: none of its pixels is decoded.
    Raises `ValueError` with half a sentence."""
    with _checked(data, most_pixels) as opened:
        width, height = opened.size
        exif = Image.Exif()
        # Not `getexif`, which decodes a PNG to look behind its pixels.
        exif.load(opened.info.get("exif", b""))
        return (height, width) if exif.get(ExifTags.Base.Orientation) in LYING else (width, height)


@contextmanager
def _checked(data: bytes, most_pixels: int) -> Iterator[Image.Image]:
    """The file, opened and not decoded. What is raised while it is in use is said of it, too."""
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as opened:
            _check(opened, most_pixels)
            yield opened
    except _Unfit as error:
        raise ValueError(str(error)) from None
    except UnidentifiedImageError:
        raise ValueError(f"it is none of {', '.join(FORMATS)}") from None
    except BROKEN as error:
        raise ValueError(f"it is broken or cut off ({said(error)})") from error


def said(error: BaseException) -> str:
    """What a library says of a picture, short and in one line."""
    return " ".join(str(error).split())[:SHOWN] or type(error).__name__


class _Unfit(Exception):
    """A file that is whole, and nothing that is read here."""


def _check(opened: Image.Image, most_pixels: int) -> None:
    width, height = opened.size
    if width < 1 or height < 1:
        raise _Unfit("it has no pixels")
    if width * height > most_pixels:
        raise _Unfit(f"it has {width} × {height} pixels, and {most_pixels} are allowed (--max-picture-pixels)")
    # How many frames there are nobody knows before all of them were read.
    if getattr(opened, "is_animated", False) and opened.format not in STILL:
        raise _Unfit("it has several frames, and a picture has one: send the one that is meant")
    if opened.mode not in MODES:
        raise _Unfit(f"its pixels are of the kind {opened.mode}: send 8 bits a colour")
