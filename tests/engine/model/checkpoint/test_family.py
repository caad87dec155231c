"""The source of a family is read, whatever else its process does."""

from __future__ import annotations

import ast
from types import SimpleNamespace

import pytest

from rollout_server.engine.model.checkpoint import family


def test_a_source_is_read_again_where_python_lost_count(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([False, False, True])

    def parse(text: str) -> ast.Module:
        if not next(counts):
            raise SystemError("AST constructor recursion depth mismatch (before=39, after=25)")
        return ast.parse(text)

    # The module's own name for it alone: other threads of this process read sources too.
    monkeypatch.setattr(family, "ast", SimpleNamespace(parse=parse))
    assert ast.unparse(family.parsed("a = 1")) == "a = 1"
    assert next(counts, None) is None
