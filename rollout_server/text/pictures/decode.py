"""A picture's file → its pixels in red, green and blue, as transformers' `load_image` makes them, or half a sentence on
why not. What a file claims is checked before it is decoded."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO

from PIL import Image, ImageOps, UnidentifiedImageError

from rollout_server.quoting import counted

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


def decoded(data: bytes, most_pixels: int) -> Image.Image:
    """Mode RGB, upright as its EXIF says. Raises `ValueError` with half a sentence."""
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as opened:
            _check(opened, most_pixels)
            opened.load()
            upright = ImageOps.exif_transpose(opened)
            return upright.convert("RGB")
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
    frames = getattr(opened, "n_frames", 1)
    if frames > 1 and opened.format not in STILL:
        raise _Unfit(f"it has {counted(frames, 'frame')}, and a picture has one: send the one that is meant")
    if opened.mode not in MODES:
        raise _Unfit(f"its pixels are of the kind {opened.mode}: send 8 bits a colour")
