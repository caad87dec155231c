"""The newcomer's commands are those of the quick start; `make newcomer` follows them for minutes."""

from __future__ import annotations

from benchmarks.studies.newcomer.__main__ import QUICK_START, Steps, completion_of
from tests.docs.pages import page_of


def test_the_page_has_the_steps_in_their_order() -> None:
    steps = Steps(*page_of(QUICK_START).blocks)
    assert steps.install.first == "make setup"
    assert steps.serve.code == "rollout-server serve\n"
    for asked in (steps.ask.code, completion_of(steps.again)):
        assert asked.startswith("curl ") and asked.count("\n") <= 2 and "rollout-server" not in asked
    assert steps.teach.title == "teach.py" and steps.push.code == "python teach.py\n"
