"""JSON that knows whether it is whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

FORMAT = 1


def sealed(body: Mapping[str, Any]) -> bytes:
    """JSON with the hash of itself in front, so that a torn or changed file is known."""
    text = json.dumps(body, sort_keys=True)
    return f'{{"sha256": "{hashlib.sha256(text.encode()).hexdigest()}", "state": {text}}}\n'.encode()


def unsealed(raw: bytes) -> dict[str, Any]:
    body = json.loads(raw)["state"]
    if sealed(body) != raw:
        raise ValueError("its content does not have the hash it names")
    if body["format"] != FORMAT:
        raise ValueError(f"it has format {body['format']}, and this version reads {FORMAT}")
    return body
