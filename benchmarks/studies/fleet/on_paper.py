"""Where one controller ends, on paper: what a row and a version take of it is measured, the rest is arithmetic.

    python -m benchmarks.studies.fleet.on_paper [--replicas 64] [--megabytes 200] [--rate 3000] [--whole 3.8]

Measured here, below HTTP and without replicas: reading a finished row from its frame, the ledger's part of a row,
writing it as JSON, and making the frame of a version. The network is a number that is given. A star sends a version to
every replica by itself; a relay would have each replica pass on what it has to two others, in pieces of 4 MB.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import numpy as np

from adapters.bundle import make_bundle
from adapters.spec import AdapterSpec, ModuleSpec
from adapters.tensors import AdapterTensor
from rollout_server.engine.messages.rollouts import RowFinished
from rollout_server.fleet.codec.frames import LENGTHS
from rollout_server.fleet.ledger.ledger import Ledger
from rollout_server.fleet.ledger.records import Dispatch, Work
from rollout_server.fleet.wire import StageVersion, link_codec
from rollout_server.rollout import FinishReason, PolicyVersion, Rollout, SamplingParams, Span, Timings

NETWORKS = (("1 GbE", 1e9 / 8), ("10 GbE", 1e10 / 8))
PIECE = 4e6
REPEATS = 20
STATUS_BYTES, STATUSES_A_S = 2000, 10


@dataclass(frozen=True)
class Cost:
    """Seconds of one core, and bytes."""

    read_row: float
    row_bytes: int
    account_row: float
    write_row: float
    json_bytes: int
    make_frame: float
    """That of a version has none of its bytes: they are the bundle's own."""

    @property
    def row(self) -> float:
        return self.read_row + self.account_row + self.write_row


def least(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Seconds of the quickest of several."""
    found = math.inf
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        found = min(found, time.perf_counter() - began)
    return found


def a_row(tokens: int) -> RowFinished:
    values = np.random.default_rng(0)
    ids = tuple(int(token) for token in values.integers(0, 150_000, tokens))
    logprobs = tuple(float(value) for value in values.standard_normal(tokens))
    version = PolicyVersion("policy", 7, "sha256:" + 64 * "0")
    spans = (Span(version, 0, tokens),)
    sampling, timings = SamplingParams(max_tokens=tokens), Timings(1.0, 1.0, 1.0)
    kept, end = (0.0,) * tokens, FinishReason.LENGTH
    rollout = Rollout(0, 0, ids[:64], ids, logprobs, logprobs, kept, spans, end, None, 1, sampling, timings)
    return RowFinished("1", rollout)


def accounted(rows: int) -> None:
    """What the ledger does for groups of eight, from their submission to their last row."""
    ledger = Ledger()
    for replica in range(64):
        ledger.join(f"r{replica}", 128, 0.0)
    ledger.submit(*(Work(group, "policy", tuple(range(64)), 8) for group in range(rows // 8)))
    for action in ledger.take():
        if isinstance(action, Dispatch):
            attempt = action.attempt
            ledger.admitted(attempt.number, ("policy", 7))
            for sample in attempt.samples:
                ledger.row(attempt.number, sample)
            ledger.over(attempt.number)


def a_version(nbytes: float) -> StageVersion:
    width = int(nbytes) // 4 // 2
    tensors = {
        name: AdapterTensor("F32", np.zeros(shape, np.float32))
        for name, shape in (("layer.lora_A", (1, width)), ("layer.lora_B", (width, 1)))
    }
    bundle = make_bundle(AdapterSpec("lora", {"layer": ModuleSpec(1, 1.0)}), tensors)
    return StageVersion("/stage/1/p", "p", 1, bundle, None, "adapter", dequantize=False)


def measured(tokens: int) -> Cost:
    codec = link_codec(_no_grammar)
    row = a_row(tokens)
    frame = codec.encode(row)
    body, rollout, rows = frame[LENGTHS.size :], row.rollout, 8 * 64
    reply = {"token_ids": rollout.token_ids, "logprobs": rollout.logprobs, "sampling_logprobs": rollout.logprobs}
    version = a_version(2e7)
    return Cost(
        read_row=least(lambda: codec.decode(body)),
        row_bytes=len(frame),
        account_row=least(lambda: accounted(rows)) / rows,
        write_row=least(lambda: msgspec.json.encode(reply)),
        json_bytes=len(msgspec.json.encode(reply)),
        make_frame=least(lambda: codec.parts(version)),
    )


def _no_grammar(grammar: object) -> object:
    raise TypeError(grammar)


def told(cost: Cost, replicas: int, megabytes: float, rate: float, tokens: int) -> str:
    """The arithmetic, as lines."""
    rows, micro = replicas * rate / tokens, 1e6
    kilobytes, out = cost.row_bytes / 1e3, cost.json_bytes / 1e3
    lines = [
        f"a row of {tokens} tokens: {micro * cost.read_row:.0f} µs to read {kilobytes:.1f} KB, "
        f"{micro * cost.account_row:.0f} µs in the ledger, {micro * cost.write_row:.0f} µs to write {out:.1f} KB",
        f"{replicas} replicas of {rate:.0f} tok/s: {rows:.0f} rows a second, {100 * rows * cost.row:.1f} % of a core",
        f"bytes of that: {rows * kilobytes / 1e3:.1f} MB/s in, {rows * out / 1e3:.1f} MB/s out, "
        f"{replicas * STATUSES_A_S * STATUS_BYTES / 1e6:.1f} MB/s of statuses",
        f"one core is full at {1 / cost.row:.0f} rows a second: {tokens / cost.row / rate:.0f} such replicas",
        f"a version: {micro * cost.make_frame:.0f} µs to make its frame for one replica; its bytes are not copied",
    ]
    for name, bandwidth in NETWORKS:
        star = replicas * megabytes * 1e6 / bandwidth
        depth = math.ceil(math.log2(replicas + 1))
        relay = 2 * (megabytes * 1e6 + depth * PIECE) / bandwidth
        row_share = rows * (cost.row_bytes + cost.json_bytes) / bandwidth
        lines.append(
            f"{name}: the last of {replicas} has it after {star:.1f} s (star) or {relay:.1f} s (relay); a push each "
            f"minute takes {100 * star / 60:.0f} % of the wire by a star, rows {100 * row_share:.1f} %"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=64)
    parser.add_argument("--megabytes", type=float, default=200.0)
    parser.add_argument("--rate", type=float, default=3000.0, help="tokens that a replica samples a second")
    parser.add_argument("--row", type=int, default=1000, help="tokens of a row")
    parser.add_argument("--whole", type=float, help="ms of a row in the controller, as the study itself measures it")
    given = parser.parse_args()
    sys.stdout.write(told(measured(given.row), given.replicas, given.megabytes, given.rate, given.row))
    if given.whole is not None:
        rows = given.replicas * given.rate / given.row
        sys.stdout.write(
            f"with {given.whole:g} ms for all of a row in the controller: {rows * given.whole / 10:.0f} % of a core, "
            f"and one core is full at {1e3 / given.whole:.0f} rows a second: "
            f"{1e3 / given.whole * given.row / given.rate:.0f} such replicas\n"
        )


if __name__ == "__main__":
    main()
