"""The example of a reranker, as a user runs it."""

from __future__ import annotations

import re

import pytest

from tests.examples.as_written import run_example
from tests.support.live_server import LiveServer


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_trained_reranker_puts_right_answers_first(live: LiveServer) -> None:
    ran = run_example("examples/rerank.py", "--url", live.url, "--steps", "40", "--questions", "40")
    assert ran.returncode == 0, ran.stderr
    before, after = re.findall(r"trained  first ([\d.]+)  mean reciprocal rank ([\d.]+)", ran.stdout)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", ran.stdout)]
    assert len(losses) == 4 and losses[-1] < losses[0]
    # One of eight answers comes first by chance; 40 questions of an untrained head differ from that by 0.05.
    assert float(before[0]) < 0.33 < float(after[0]), ran.stdout
    assert float(after[1]) > float(before[1])
