"""Which sections there are, in the order of the report: name → the module whose `section(scale)` measures it."""

from __future__ import annotations

SECTIONS = {
    "decode": "benchmarks.decode",
    "http": "benchmarks.over_http",
    "staggered": "benchmarks.staggered",
    "arrays": "benchmarks.arrays",
    "growth": "benchmarks.growth",
    "rows": "benchmarks.rows",
    "fairness": "benchmarks.fairness",
    "constrained": "benchmarks.constrained",
    "turns": "benchmarks.prefix_reuse",
    "flood": "benchmarks.flood",
    "replies": "benchmarks.reply_sizes",
    "replay": "benchmarks.replay",
}

PEERS = {"generate": "benchmarks.generate"}
"""Only in the environment with torch: `make bench-peers`."""

ONE_SIZE = {"rows", "constrained", "turns", "fairness", "replies"}
"""Measured at the size the figures are asked for with `--full` or without."""
