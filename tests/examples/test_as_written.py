"""Examples are run as users run them, but for how many threads multiply: other tests run beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.examples.as_written import THREADS, run_example


def test_an_example_multiplies_in_as_many_threads_as_the_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*THREADS, "ROLLOUT_API_KEY"):
        monkeypatch.setenv(name, "1")
    example = tmp_path / "example.py"
    example.write_text(f"import os; print([os.environ.get(name) for name in {(*THREADS, 'ROLLOUT_API_KEY')}])")
    assert run_example(str(example)).stdout == "['1', '1', None]\n"
