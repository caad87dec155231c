"""Pictures' files, whole and broken, for whoever reads them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from io import BytesIO
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image


def drawn(width: int, height: int, seed: int = 3) -> Image.Image:
    """Smooth colours and some noise, so that nothing about it is symmetric."""
    generator = np.random.default_rng(seed)
    across, down = np.linspace(0, 200, width)[None], np.linspace(20, 180, height)[:, None]
    planes = np.stack([across + 0 * down, down + 0 * across, (across + down) / 2], -1)
    noise = generator.integers(0, 50, planes.shape)
    return Image.fromarray((planes + noise).clip(0, 255).astype(np.uint8))


def saved(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def rotated(image: Image.Image, orientation: int) -> bytes:
    """A JPEG that says how it is to be turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(image, "JPEG", exif=exif, quality=95)


def palette_with_transparency() -> bytes:
    image = drawn(20, 14).convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
    return saved(image, "PNG", transparency=3)


def bomb(side: int = 60_000) -> bytes:
    """A PNG of a few bytes that says it has side · side pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 100_000, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def animated(format: str) -> bytes:
    first, second = drawn(16, 12), drawn(16, 12, seed=9)
    return saved(first, format, save_all=True, append_images=[second])


READABLE: Mapping[str, bytes] = MappingProxyType(
    {
        "png": saved(drawn(48, 30)),
        "jpeg": saved(drawn(48, 30), "JPEG"),
        "webp": saved(drawn(48, 30), "WEBP"),
        "still gif": saved(drawn(20, 30), "GIF"),
        "bmp": saved(drawn(20, 30), "BMP"),
        "grey": saved(drawn(20, 30).convert("L")),
        "grey with alpha": saved(drawn(20, 30).convert("LA")),
        "alpha": saved(drawn(20, 30).convert("RGBA")),
        "one bit": saved(drawn(20, 30).convert("1")),
        "palette with transparency": palette_with_transparency(),
        "cmyk": saved(drawn(20, 30).convert("CMYK"), "JPEG"),
        "one pixel": saved(drawn(1, 1)),
        **{f"turned {way}": rotated(drawn(40, 24), way) for way in range(1, 9)},
    }
)
UNREADABLE: Mapping[str, tuple[bytes, str]] = MappingProxyType(
    {
        "nothing": (b"", "none of PNG"),
        "text": (b"hello, I am a picture", "none of PNG"),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "none of PNG"),
        "tiff": (saved(drawn(8, 8), "TIFF"), "none of PNG"),
        "half a png": (saved(drawn(48, 30))[:900], "broken or cut off"),
        "half a jpeg": (saved(drawn(48, 30), "JPEG")[:500], "broken or cut off"),
        "a head alone": (saved(drawn(48, 30))[:20], "broken or cut off"),
        "bomb": (bomb(), "pixels"),
        "huge": (saved(Image.new("L", (1_200, 1_200))), "1200 × 1200 pixels"),
        "16 bits": (saved(Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20))), "8 bits a colour"),
        "animated gif": (animated("GIF"), "several frames"),
        "animated png": (animated("PNG"), "several frames"),
        "animated webp": (animated("WEBP"), "several frames"),
    }
)
"""Each with a part of what is said of it, within a limit of a million pixels."""


def mutated(data: bytes, generator: np.random.Generator) -> bytes:
    """Bytes changed, taken away, doubled or cut off, more of them in front, where the headers are."""
    changed = bytearray(data)
    for _ in range(int(generator.integers(1, 8))):
        at = int(len(changed) * generator.random() ** 3)
        match int(generator.integers(5)):
            case 0:
                changed[at : at + 1] = bytes([int(generator.integers(256))])
            case 1:
                del changed[at : at + int(generator.integers(1, 40))]
            case 2:
                changed[at:at] = generator.bytes(int(generator.integers(1, 40)))
            case 3:
                changed[at:at] = changed[at : at + int(generator.integers(1, 200))]
            case _:
                changed[at : at + 4] = struct.pack(">I", int(generator.choice([0, 1, 0x7FFFFFFF, 0xFFFFFFFF])))
    return bytes(changed[: int(len(changed) * generator.random())] if generator.random() < 0.1 else changed)
