"""What being looked at costs: `python -m benchmarks.studies.page.watched [--rounds 8] [--viewers 1] [--json]`.

A server process decodes 32 rows without a pause. Windows with and without viewers, which read the page's stream of
frames as a browser does and draw nothing, are taken in turns; the figure is the median of their ratios. Where Chromium
and selenium are, the page is also opened, and says when it had drawn its first frame. At last, what noting a row that
has ended costs, in the process itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx

ROWS, ROW_TOKENS = 32, 256
WARM_S, SETTLE_S = 3.0, 0.5


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.page.watched", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=8, help="windows of each kind, taken in turns")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each window")
    parser.add_argument("--viewers", type=int, default=1, help="streams that are read at once")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    report = run(options.rounds, options.seconds, options.viewers)
    print(
        json.dumps(report, indent=2)
        if options.json
        else "\n".join(f"{name}: {value}" for name, value in report.items())
    )


def run(rounds: int, seconds: float, viewers: int) -> dict[str, Any]:
    from tests.support.live_server import live_server

    with live_server(None) as server:
        report: dict[str, Any] = {"viewers": viewers, "first_frame_ms": opened(server.url)}
        with load(server.url):
            time.sleep(WARM_S)
            ratios, rates = [], []
            for turn in range(rounds):
                # Whichever comes second profits or suffers from what the machine does meanwhile: they take turns.
                pair = {
                    count: rate(server.url, seconds, count) for count in ((0, viewers) if turn % 2 else (viewers, 0))
                }
                ratios.append(pair[viewers] / pair[0])
                rates.append(pair[0])
    report["tokens_per_s"] = round(statistics.median(rates))
    report["watched_to_unwatched"] = round(statistics.median(ratios), 4)
    report["ratios"] = [round(ratio, 3) for ratio in ratios]
    report["noting_a_row_us"] = round(1e6 * noting(), 1)
    report["noting_share"] = round(noting() * report["tokens_per_s"] / ROW_TOKENS, 5)
    return report


@contextmanager
def load(url: str) -> Iterator[None]:
    """Rows of `ROW_TOKENS` tokens, asked for again when they have ended; four requests that begin at different lengths,
    so that a step costs the same in every window."""
    over = threading.Event()

    def ask(length: int) -> None:
        while not over.is_set():
            sampling = {"max_tokens": length, "ignore_eos": True}
            body = {"policy": "base", "n": ROWS // 4, "prompts": [{"text": "1+1="}], "sampling": sampling}
            httpx.post(f"{url}/v1/rollouts", json=body, timeout=None)
            length = ROW_TOKENS

    threads = [threading.Thread(target=ask, args=(ROW_TOKENS * part // 4,)) for part in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        httpx.post(f"{url}/v1/pause", json={"mode": "abort"})
        for thread in threads:
            thread.join()


def rate(url: str, seconds: float, viewers: int) -> float:
    """Tokens a second that are sampled while so many look."""
    with ExitStack() as stack:
        for _ in range(viewers):
            stack.enter_context(viewer(url))
        return sampled(url, seconds)


def sampled(url: str, seconds: float) -> float:
    """Tokens a second in a window that begins when what came before it has settled."""
    time.sleep(SETTLE_S)
    (began, before), _ = tokens(url), time.sleep(seconds)
    ended, after = tokens(url)
    return (after - before) / (ended - began)


def tokens(url: str) -> tuple[float, int]:
    count = httpx.get(f"{url}/health").json()["tokens"]
    return time.perf_counter(), count


@contextmanager
def viewer(url: str) -> Iterator[None]:
    """Reads frames until the context is left."""
    over = threading.Event()

    def look() -> None:
        with httpx.stream("GET", f"{url}/page/events", timeout=None) as reply:
            for _ in reply.iter_raw():
                if over.is_set():
                    return

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def opened(url: str) -> float | None:
    """Milliseconds from the navigation to the first frame that was drawn; None without a browser."""
    from tests.page.browser import browser, missing

    if missing() is not None:
        return None
    with browser() as page:
        times = []
        for _ in range(5):
            page.open(url)
            times.append(page.run("return performance.getEntriesByName('first-frame')[0].startTime"))
    return round(statistics.median(times), 1)


def noting() -> float:
    """Seconds of the processor that the observer takes for a row of `ROW_TOKENS` tokens with every array there is."""
    from rollout_server.engine.messages.status import EngineStatus
    from rollout_server.http.metrics import Metrics
    from rollout_server.http.observing.observer import Observer
    from rollout_server.rollout import FinishReason, PolicyVersion, Rollout, SamplingParams, Span, Timings

    values = tuple(-0.5 for _ in range(ROW_TOKENS))
    version = PolicyVersion("policy", 1, "sha256:" + "a" * 64)
    row = Rollout(
        0, 0, (1,) * 64, (1,) * ROW_TOKENS, values, values, values, (Span(version, 0, ROW_TOKENS),),
        FinishReason.LENGTH, None, 1, SamplingParams(ROW_TOKENS + 1), Timings(1.0, 1.0, 1.0, 1.0),
        entropy=values, base_logprobs=values,
    )  # fmt: skip
    metrics = Metrics({})
    observer = Observer(lambda: EngineStatus("ready"), metrics.rows, metrics.push)
    began = time.process_time()
    for _ in range(2000):
        observer.finished("r", row)
    return (time.process_time() - began) / 2000


if __name__ == "__main__":
    main()
