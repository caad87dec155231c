"""mlx-lm doing a trainer's step, in process and as a server, at its best settings. It has its adapter from the start:
to change one it loads the model again, which is not counted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_sampler

from benchmarks.servers.compared import peer_server
from benchmarks.servers.load import drive
from benchmarks.whole_job.job import Job

APART_S = 0.005
"""Between two requests: its socket lets five connections wait, and further ones come a second later or break."""


class BatchGeneratorJob:
    """`BatchGenerator` in this process, every prompt repeated for each of its samples, which is how it is given them.
    At most `rows` decode together; `prefill_batch_size` is the faster of its default of 8 and as many as rows, in one
    small run of each. Its log-probabilities are left on the device, unread."""

    def __init__(self, job: Job, rows: int, adapter: Path | None = None) -> None:
        loaded = mlx_lm.load(str(job.model), adapter_path=None if adapter is None else str(adapter))
        self._model: nn.Module = loaded[0]
        self._job = job
        self._rows = min(rows, job.rows)
        small = replace(job, prompts=min(job.prompts, max(1, self._rows // job.n)), tokens=min(job.tokens, 4))
        for size in (8, self._rows):
            self._run(small, 0, size)
        self.prefill = min((8, self._rows), key=lambda size: self._run(small, 0, size))

    def seconds(self, number: int) -> float:
        """Seconds of step `number`, prefill included."""
        return self._run(self._job, number, self.prefill)

    def _run(self, job: Job, number: int, prefill: int) -> float:
        prompts = [ids for ids in job.ids(number) for _ in range(job.n)]
        began = time.perf_counter()
        generator = BatchGenerator(
            self._model,
            max_tokens=job.tokens,
            sampler=make_sampler(1.0),
            completion_batch_size=self._rows,
            prefill_batch_size=prefill,
        )
        generator.insert(prompts)
        sampled = ended = 0
        while ended < job.rows:
            replies = generator.next_generated()
            sampled += len(replies)
            ended += sum(reply.finish_reason is not None for reply in replies)
        mx.synchronize(generator.stream)
        seconds = time.perf_counter() - began
        generator.close()
        if sampled != job.sampled:
            raise RuntimeError(f"BatchGenerator sampled {sampled} tokens where {job.sampled} were asked for.")
        return seconds


@dataclass(frozen=True, slots=True)
class PeerServer:
    """`mlx_lm.server` with as many rows together as ours has. A request has one sample, so a prompt is sent once for
    each of them, and as text, since it takes no ids; `clients` requests are open at once. They ask for
    log-probabilities, without which a trainer has no use for them."""

    url: str
    job: Job
    clients: int

    def rate(self, number: int) -> float:
        """Completion tokens, by each reply's own count, a second: an end token may end a row early."""
        body: dict[str, Any] = {"max_tokens": self.job.tokens, "temperature": 1.0, "logprobs": True}
        requests = [body | {"prompt": text} for text in self.job.texts(number) for _ in range(self.job.n)]
        done = asyncio.run(drive(self.url, "/v1/completions", requests, self.clients, apart_s=APART_S))
        return done.tokens() / done.seconds


@contextmanager
def mlx_lm_server(job: Job, rows: int, adapter: Path | None = None) -> Iterator[PeerServer]:
    # Of its default model the adapter is the one on the command line, whatever a request names.
    options = () if adapter is None else ("--adapter-path", str(adapter))
    with peer_server(job.model, min(rows, job.rows), *options) as url:
        yield PeerServer(url, job, min(rows, job.rows))
