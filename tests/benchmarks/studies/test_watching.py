"""The parts of what being looked at costs, each once: that they still fit what they measure."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
from structlog.contextvars import get_contextvars

from benchmarks.studies.page import processor
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


@pytest.mark.skipif(not processor.counted(), reason="this system does not count the time of threads so")
def test_time_of_the_processor_is_that_of_the_main_thread_and_of_all_below_a_process() -> None:
    """A child that has worked, and then waits, has done so in its main thread; what another thread did, and a process
    below it, is not in that, and is in the sum."""
    program = (
        "import subprocess, sys, threading, time\n"
        "def work(seconds):\n"
        "    while time.thread_time() < seconds: pass\n"
        "thread = threading.Thread(target=lambda: (work(0.2), sys.stdin.read(1)))\n"
        "work(0.1); thread.start()\n"
        "while time.process_time() - time.thread_time() < 0.2: time.sleep(0.01)\n"
        "works = 'import sys, time\\nwhile time.process_time() < 0.2: pass\\nprint(1, flush=True); sys.stdin.read()'\n"
        "below = subprocess.Popen([sys.executable, '-c', works], stdout=subprocess.PIPE)\n"
        "below.stdout.readline()\n"
        "print('done', time.thread_time(), flush=True); thread.join()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdin is not None
        own = float(child.stdout.readline().split()[1])
        main, below = processor.of_main_thread(child.pid), processor.of_tree(child.pid)
        child.stdin.close()
    assert main >= own >= 0.1
    assert below >= main + 0.2 + 0.2
    assert processor.of_main_thread(child.pid) == 0.0, "it has ended"
