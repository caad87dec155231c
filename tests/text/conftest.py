"""A small real tokenizer, and what tests of long texts send to the routes."""

from __future__ import annotations

from tests.support.http.fixtures import (
    problem as problem,
)
from tests.support.http.fixtures import (
    tokenizer as tokenizer,
)
