"""What being looked at costs: `python -m benchmarks.studies.page.watched [--rounds 8] [--viewers 1] [--browser]`.

A server process decodes 32 rows without a pause. Windows with and without viewers, which ask for what the page asks
for and draw nothing, are taken in turns; `watched_to_unwatched` is the median of the ratios of their throughputs. What
a machine with other work makes of that is wide, so the processor's time is measured as well: `loop_ms_per_s` is what
the server's event loop takes of a second, watched and unwatched, however many cores there are.

With `--browser` the viewer is the page in Chromium, which shares the cores with the server here, and does not where
people look from machines of their own; `browser_ms_per_s` is what it takes. Where Chromium and selenium are, the page
is also opened, and says when it had drawn its first frame. At last, what noting a row that has ended costs, in the
process itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import httpx

from benchmarks.studies.page import processor

if TYPE_CHECKING:
    from tests.page.browser import Browser

ROWS, ROW_TOKENS = 32, 256
WARM_S, SETTLE_S = 3.0, 0.5
FOLLOW_S = 5.0
"""How often the page asks for the newest rollout, while nobody has chosen one."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.page.watched", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=8, help="windows of each kind, taken in turns")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each window")
    parser.add_argument("--viewers", type=int, default=1, help="streams that are read at once")
    parser.add_argument("--browser", action="store_true", help="look with Chromium instead")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    report = run(options.rounds, options.seconds, options.viewers, drawn=options.browser)
    print(
        json.dumps(report, indent=2)
        if options.json
        else "\n".join(f"{name}: {value}" for name, value in report.items())
    )


def run(rounds: int, seconds: float, viewers: int, *, drawn: bool = False) -> dict[str, Any]:
    from tests.page.browser import browser, missing
    from tests.support.live_server import live_server

    if drawn and (why := missing()):
        raise SystemExit(f"error: --browser looks with Chromium. {why}.")
    with ExitStack() as stack:
        server = stack.enter_context(live_server(None))
        page = stack.enter_context(browser()) if missing() is None else None
        report: dict[str, Any] = {
            "viewers": "Chromium" if drawn else viewers,
            "first_frame_ms": opened(page, server.url),
        }
        stack.enter_context(load(server.url))
        time.sleep(WARM_S)
        windows = Windows(server.url, server.process.pid, seconds, page if drawn else None, viewers)
        taken = [windows.pair(watched_first=turn % 2 == 0) for turn in range(rounds)]
    ratios = [watched["per_s"] / unwatched["per_s"] for watched, unwatched in taken]
    report["tokens_per_s"] = round(statistics.median(unwatched["per_s"] for _, unwatched in taken))
    report["watched_to_unwatched"] = round(statistics.median(ratios), 4)
    report["ratios"] = [round(ratio, 3) for ratio in ratios]
    for spent in ("loop_ms_per_s", "browser_ms_per_s") if processor.counted() else ():
        watched, unwatched = ([window[spent] for window in kind] for kind in zip(*taken, strict=True))
        report[spent] = [round(statistics.median(kind), 2) for kind in (watched, unwatched)]
    report["noting_a_row_us"] = round(1e6 * noting(), 1)
    report["noting_share"] = round(noting() * report["tokens_per_s"] / ROW_TOKENS, 5)
    return report


class Windows:
    """Windows of one server under load: what it samples, and what its event loop and the browser take meanwhile."""

    def __init__(self, url: str, pid: int, seconds: float, page: Browser | None, viewers: int) -> None:
        self._url, self._pid, self._seconds, self._page, self._viewers = url, pid, seconds, page, viewers

    def pair(self, *, watched_first: bool) -> tuple[dict[str, float], dict[str, float]]:
        """A watched window and one that is not: whichever comes second profits or suffers from what the machine does
        meanwhile, so they take turns."""
        found = {watched: self._window(watched=watched) for watched in (watched_first, not watched_first)}
        return found[True], found[False]

    def _window(self, *, watched: bool) -> dict[str, float]:
        with ExitStack() as stack:
            if watched and self._page is not None:
                self._page.open(self._url)
                stack.callback(self._page.driver.get, "about:blank")
            elif watched:
                for _ in range(self._viewers):
                    stack.enter_context(viewer(self._url))
            time.sleep(SETTLE_S)
            loop, drawing, began = processor.of_main_thread(self._pid), self._drawing(), time.perf_counter()
            per_s = sampled(self._url, self._seconds)
            took = time.perf_counter() - began
            loop, drawing = processor.of_main_thread(self._pid) - loop, self._drawing() - drawing
        return {"per_s": per_s, "loop_ms_per_s": 1e3 * loop / took, "browser_ms_per_s": 1e3 * drawing / took}

    def _drawing(self) -> float:
        return 0.0 if self._page is None else processor.of_tree(self._page.driver.service.process.pid)


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


def sampled(url: str, seconds: float) -> float:
    """Tokens a second in a window that begins when what came before it has settled."""
    time.sleep(SETTLE_S)
    began, before = tokens(url)
    time.sleep(seconds)
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
        with httpx.Client(timeout=None) as client, client.stream("GET", f"{url}/page/events") as reply:
            asked = float("-inf")
            for event in events(reply):
                if over.is_set():
                    return
                if event.get("rollouts") and time.monotonic() - asked >= FOLLOW_S:
                    asked, newest = time.monotonic(), event["rollouts"][0]
                    number = newest if isinstance(newest, int) else newest["number"]
                    httpx.get(f"{url}/page/rollouts/{number}")

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def events(reply: httpx.Response) -> Iterator[dict[str, Any]]:
    """The frames of a stream, as they come."""
    left = b""
    for chunk in reply.iter_raw():
        *whole, left = (left + chunk).split(b"\n\n")
        yield from (json.loads(event.removeprefix(b"data: ")) for event in whole)


def opened(page: Browser | None, url: str) -> float | None:
    """Milliseconds from the navigation to the first frame that was drawn; None without a browser."""
    if page is None:
        return None
    times = []
    for _ in range(5):
        page.open(url)
        times.append(page.run("return performance.getEntriesByName('first-frame')[0].startTime"))
    page.driver.get("about:blank")
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
