"""Which sections there are, in the order of the report: name → the module whose `section(scale)` measures it."""

from __future__ import annotations

SECTIONS = {
    "step": "benchmarks.sections.server.step",
    "decode": "benchmarks.sections.engine.decode",
    "http": "benchmarks.sections.server.http",
    "staggered": "benchmarks.sections.engine.staggered",
    "arrays": "benchmarks.sections.server.arrays",
    "growth": "benchmarks.sections.engine.growth",
    "rows": "benchmarks.sections.engine.rows",
    "fairness": "benchmarks.sections.engine.fairness",
    "constrained": "benchmarks.sections.engine.constrained",
    "turns": "benchmarks.sections.engine.turns",
    "flood": "benchmarks.sections.server.flood",
    "replies": "benchmarks.sections.server.replies",
    "replay": "benchmarks.sections.engine.replay",
}

PEERS = {"generate": "benchmarks.sections.engine.generate"}
"""Only in the environment with torch: `make bench-peers`."""

ONE_SIZE = {"rows", "constrained", "turns", "fairness", "replies"}
"""Measured at the size the figures are asked for with `--full` or without."""
