"""A small real tokenizer."""

from __future__ import annotations

from tests.support.http.fixtures import (
    tokenizer as tokenizer,
)
