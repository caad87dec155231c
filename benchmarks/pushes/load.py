"""Rollouts without a pause, as a process of its own: `python -m benchmarks.pushes.load URL --policy NAME`.

Threads ask for groups of eight again and again, more rows than the batch has room for, so that it is always full. Ends
when its standard input is closed.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import threading
from urllib.parse import urlsplit

import numpy as np

from benchmarks.model import VOCAB_SIZE

GROUP = 8


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pushes.load", description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--policy", default="base")
    parser.add_argument("--on-update", default="finish")
    parser.add_argument("--rows", type=int, default=32, help="that decode together; a quarter more wait")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128, help="of each row")
    options = parser.parse_args()
    workers = options.rows // GROUP + max(1, options.rows // GROUP // 4)
    for number in range(workers):
        threading.Thread(target=ask_for_ever, args=(options, number), daemon=True).start()
    sys.stdin.read()


def ask_for_ever(options: argparse.Namespace, number: int) -> None:
    draw = np.random.default_rng(number)
    connection = http.client.HTTPConnection(urlsplit(options.url).netloc, timeout=120)
    first = True
    while True:
        # The first rows end one worker after another, so that joins are spread as in a running server.
        tokens = options.tokens * (number + 1) // (options.rows // GROUP + 1) if first else options.tokens
        body = {
            "policy": options.policy,
            "n": GROUP,
            "prompts": [{"token_ids": draw.integers(0, VOCAB_SIZE, options.prompt_tokens).tolist()}],
            "sampling": {"max_tokens": max(1, tokens), "ignore_eos": True},
            "on_update": options.on_update,
        }
        connection.request("POST", "/v1/rollouts", json.dumps(body), {"content-type": "application/json"})
        reply = connection.getresponse()
        text = reply.read()
        if reply.status != 200:
            raise RuntimeError(f"A rollout was answered with {reply.status}: {text[:500]!r}")
        first = False


if __name__ == "__main__":
    main()
