"""Sections of docs/benchmarks.md; `python -m benchmarks NAME` measures one."""
