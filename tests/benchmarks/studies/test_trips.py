"""How many files somebody opens who follows a request: counted of real ones, in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FOR_ROWS = ("admission", "preemption", "throughput", "turn_budget", "turn_costs")


@pytest.fixture(scope="module")
def trips() -> dict[str, set[str]]:
    """The files of each trip."""
    command = [sys.executable, "-m", "benchmarks.studies.trips", "--files"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, set[str]] = {}
    files: set[str] = set()
    for line in done.stdout.splitlines():
        if entered := re.match(r" {4}(\S+\.py) \(", line):
            files.add(entered[1])
        else:
            files = found[re.split(r" {2,}", line)[0]] = set()
    return found


@pytest.mark.long
def test_a_trip_enters_no_more_files_than_the_record_says(trips: dict[str, set[str]]) -> None:
    record = (ROOT / "docs" / "decisions" / "13-trips.md").read_text()
    said = re.search(
        r"(\d+) for `POST /v1/rollouts`, (\d+) for\s+`POST /v1/weights`, (\d+) in a turn that only decodes, (\d+)",
        record,
    )
    assert said is not None
    found = [len(trips[name]) for name in ("POST /v1/rollouts", "POST /v1/weights", "a turn", "its step")]
    for count, most in zip(found, map(int, said.groups()), strict=True):
        assert 0 < count <= most, "one more is decided there first"


@pytest.mark.long
def test_a_steady_step_enters_no_more_than_twelve_files(trips: dict[str, set[str]]) -> None:
    assert 0 < len(trips["its step"]) <= 12 and trips["its step"] <= trips["a turn"]


@pytest.mark.long
def test_a_push_to_an_engine_at_rest_enters_nothing_that_rows_need(trips: dict[str, set[str]]) -> None:
    push, rollout = trips["POST /v1/weights"], trips["POST /v1/rollouts"]
    rooms = {f"rollout_server/engine/scheduling/{name}.py" for name in FOR_ROWS}
    assert rooms <= rollout and not rooms & push
    assert {"rollout_server/engine/policies/table.py", "adapters/versions/registry.py"} <= push
