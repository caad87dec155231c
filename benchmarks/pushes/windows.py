"""Decode throughput in windows of a few seconds, and the gaps between tokens that one row sees meanwhile."""

from __future__ import annotations

import http.client
import itertools
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from benchmarks.servers.processes import Served

PERIOD_S = 1.0


@dataclass
class Watcher:
    """Streams one row after another and notes when each of its tokens comes."""

    url: str
    policy: str
    times: list[list[float]] = field(default_factory=list)
    """One list for each stream."""

    def start(self) -> None:
        threading.Thread(target=self._watch, daemon=True).start()

    def gaps_ms(self, begin: float, end: float) -> list[float]:
        """Between two tokens of one row that came in this time."""
        found = []
        for stream in list(self.times):
            pairs = itertools.pairwise(list(stream))
            found += [1e3 * (later - earlier) for earlier, later in pairs if earlier >= begin and later <= end]
        return found

    def _watch(self) -> None:
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=120)
        body = {
            "model": self.policy,
            "prompt": [5, 9, 33],
            "max_tokens": 128,
            "stream": True,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        while True:
            connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
            reply = connection.getresponse()
            if reply.status != 200:
                raise RuntimeError(f"The watched row was answered with {reply.status}: {reply.read(500)!r}")
            stream: list[float] = []
            self.times.append(stream)
            while line := reply.readline():
                if line.startswith(b"data: {"):
                    stream.append(time.perf_counter())


@dataclass(frozen=True, slots=True)
class Window:
    tokens_per_s: float
    gaps_ms: list[float]


def measure(served: Served, watcher: Watcher, seconds: float, act: Callable[[], object] | None) -> Window:
    """Decodes for about so long; `act` is called once a second, at first after half a second."""
    begin, before = time.perf_counter(), served.tokens
    due = begin + PERIOD_S / 2
    while act is not None and due < begin + seconds:
        time.sleep(max(0.0, due - time.perf_counter()))
        act()
        due += PERIOD_S
    time.sleep(max(0.0, begin + seconds - time.perf_counter()))
    tokens, end = served.tokens - before, time.perf_counter()
    return Window(tokens / (end - begin), watcher.gaps_ms(begin, end))
