"""Loads the BLAS first: whatever is collected after this may import mlx."""

from __future__ import annotations

from rollout_server.blas import load_fast_blas

BLAS = load_fast_blas()


def pytest_report_header() -> str:
    return str(BLAS)
