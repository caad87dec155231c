"""The parts of what being looked at costs, each once: that they still fit what they measure."""

from __future__ import annotations

import logging

from structlog.contextvars import get_contextvars

from benchmarks.studies.page.observed import line, scraping
from benchmarks.studies.page.watched import noting
from rollout_server import logs
from tests.support.live_server import server_here


def test_the_parts_are_measured_and_leave_the_log_as_it_was() -> None:
    before = [logging.getLogger(name).handlers for name in logs.CONFIGURED]
    with server_here(None) as server:
        assert scraping(server.url, 2) > 0.0
    assert noting() > 0.0 and line(10) > 0.0
    assert [logging.getLogger(name).handlers for name in logs.CONFIGURED] == before
    assert not get_contextvars(), "what is logged later is about no request"
