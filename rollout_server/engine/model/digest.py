"""What identifies a base: config, sizes and headers are equal for two fine-tunes of one architecture, bytes are not."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

PATTERNS = (
    "config.json",
    "model*.safetensors",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "chat_template*",
)


def base_digest(directory: Path, cache: Path | None = None) -> str:
    """`sha256:…` over model config, tokenizer files and every weight byte, file by file in name order.

    Computed once per (path, size, mtime, inode) of the files and remembered in `cache`."""
    files = sorted({path for pattern in PATTERNS for path in directory.glob(pattern) if path.is_file()})
    marks = []
    for path in files:
        stat = path.stat()
        marks.append(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}")
    key = hashlib.sha256("\n".join(marks).encode()).hexdigest()
    cache = cache or Path.home() / ".cache" / "rollout-server" / "base-digests.json"
    known = _read(cache)
    if key in known:
        return known[key]
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}\n{path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    known[key] = f"sha256:{digest.hexdigest()}"
    _write(cache, known)
    return known[key]


def _read(cache: Path) -> dict[str, str]:
    try:
        known = json.loads(cache.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write(cache: Path, known: dict[str, str]) -> None:
    """A cache that cannot be written only costs time."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        fresh = cache.with_suffix(f".{os.getpid()}.part")
        fresh.write_text(json.dumps(known))
        fresh.replace(cache)
    except OSError:
        return
