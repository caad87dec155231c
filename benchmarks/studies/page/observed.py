"""What metrics and logs cost: `python -m benchmarks.studies.page.observed [--rounds 8] [--seconds 4] [--json]`.

A server decodes 32 rows without a pause. Windows in which `/metrics` is read once a second, 15 times as often as
Prometheus does unless told otherwise, and windows in which it is not, are taken in turns; the figure is the median of
their ratios. What a machine with other work makes of that is wide, so the parts are summed as well, in seconds of the
processor: a reading of `/metrics` with its reply, a row that is noted when it ends, and a line of the JSON log for each
request. Their share is that of one core of the time in which a server at this rate gives rise to them.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import copy_context
from typing import Any

import httpx

from benchmarks.studies.page.watched import ROW_TOKENS, ROWS, WARM_S, load, noting, sampled

EVERY_S = 1.0
"""Between two readings of /metrics."""
REQUEST_ROWS = ROWS // 4


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.page.observed", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=8, help="windows of each kind, taken in turns")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each window")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    report = run(options.rounds, options.seconds)
    print(
        json.dumps(report, indent=2)
        if options.json
        else "\n".join(f"{name}: {value}" for name, value in report.items())
    )


def run(rounds: int, seconds: float) -> dict[str, Any]:
    from tests.support.live_server import live_server, server_here

    with live_server(None, "--log-format", "json") as server, load(server.url):
        time.sleep(WARM_S)
        ratios, rates = [], []
        for turn in range(rounds):
            # Whichever comes second profits or suffers from what the machine does meanwhile: they take turns.
            pair = {read: rate(server.url, seconds, read) for read in ((False, True) if turn % 2 else (True, False))}
            ratios.append(pair[True] / pair[False])
            rates.append(pair[False])
    with server_here(None) as quiet:
        scrape = scraping(quiet.url)
    per_s = statistics.median(rates)
    rows_per_s = per_s / ROW_TOKENS
    return {
        "tokens_per_s": round(per_s),
        "scraped_to_unscraped": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "a_scrape_ms": round(1e3 * scrape, 2),
        "noting_a_row_us": round(1e6 * noting(), 1),
        "a_line_us": round(1e6 * line(), 1),
        "metrics_share": round(scrape / EVERY_S + noting() * rows_per_s, 5),
        "logs_share": round(line() * rows_per_s / REQUEST_ROWS, 6),
    }


def rate(url: str, seconds: float, read: bool) -> float:
    """Tokens a second that are sampled while the metrics are read, or are not."""
    with scraper(url) if read else nullcontext():
        return sampled(url, seconds)


@contextmanager
def scraper(url: str) -> Iterator[None]:
    """Reads /metrics until the context is left."""
    over = threading.Event()

    def look() -> None:
        with httpx.Client() as client:
            while not over.wait(EVERY_S):
                client.get(f"{url}/metrics").raise_for_status()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def scraping(url: str, count: int = 200) -> float:
    """Seconds of the processor that one reading of /metrics takes, of a server of this process that has nothing else to
    do; what the client takes for it is in them."""
    with httpx.Client() as client:
        client.get(f"{url}/metrics").raise_for_status()
        began = time.process_time()
        for _ in range(count):
            client.get(f"{url}/metrics").raise_for_status()
        return (time.process_time() - began) / count


def line(count: int = 2000) -> float:
    """Seconds of the processor for the line of a request in the JSON log. Lines that are written later are about no
    request: what a line is about belongs to a context."""
    return copy_context().run(_line, count)


def _line(count: int) -> float:
    from rollout_server import logs

    logger = logging.getLogger("rollout_server.http.middleware")
    named = [logging.getLogger(name) for name in logs.CONFIGURED]
    before = [(each.handlers, each.level, each.propagate) for each in named]
    logs.configure("json", stream=io.StringIO())
    fields = {"method": "POST", "path": "/v1/rollouts", "status": 200, "ms": 1234.5}
    try:
        logs.about({logs.REQUEST_ID: "r" * 32, logs.POLICY: "policy", logs.VERSION: 12})
        began = time.process_time()
        for _ in range(count):
            logger.info("%(method)s %(path)s %(status)s %(ms)s ms", fields, extra={"fields": fields})
        return (time.process_time() - began) / count
    finally:
        for each, state in zip(named, before, strict=True):
            each.handlers, each.level, each.propagate = state


if __name__ == "__main__":
    main()
