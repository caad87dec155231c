"""Who is scored next: the jobs take turns, and a reader is kept as full as one turn's share of the budget.

Every job may have one sequence in the reader; more only while the reader holds less than a turn can read. Their KV
counts against the rows' memory: nothing joins that does not fit, or while a group of rows waits for memory. For the
first sequence room is kept: no row joins until it fits, and where nothing runs it joins in any case, so that neither
can wait for the other for ever.
"""

from __future__ import annotations

from collections import deque
from typing import Literal

from rollout_server.engine.batch.prefix_reuse import PrefixReuse
from rollout_server.engine.blame import Blame
from rollout_server.engine.kv_cache.ledger import KVLedger
from rollout_server.engine.model.resident import ResidentModel
from rollout_server.engine.policies.table import PolicyTable
from rollout_server.engine.scoring.batched import BatchedReader
from rollout_server.engine.scoring.job import ScoreJob, SharedPrefix
from rollout_server.engine.scoring.reader import Reader, logit_tokens
from rollout_server.engine.scoring.sequential import SequentialReader
from rollout_server.engine.sight.seen import View
from rollout_server.errors import EngineUnavailable, RolloutError
from rollout_server.text.pictures.picture import Picture


def make_reader(model: ResidentModel, policies: PolicyTable, prefixes: PrefixReuse) -> Reader:
    """The batched reader for models whose self-test chose slots, else the one that takes a sequence at a time."""
    info = model.info
    hidden, kernel = model.hidden if model.trunk else None, model.filter_kernel
    chunk = logit_tokens(info.vocab_size, info.kv_memory)
    if info.cache != "slots":
        cells = lambda columns: info.row_bytes(columns) // info.kv_bytes_per_token  # noqa: E731
        return SequentialReader(model.forward, model.make_caches, policies.route_rows, chunk, cells, hidden, kernel)

    return BatchedReader(
        model.forward, model.make_padded, policies.route_rows, policies.apart, chunk, prefixes, hidden, kernel
    )


class ScoringQueue:
    def __init__(self, reader: Reader, policies: PolicyTable, ledger: KVLedger, blame: Blame) -> None:
        self._reader = reader
        self._policies = policies
        self._blame = blame
        self._ledger = ledger
        ledger.register("scoring", lambda: self.cells, wanted=lambda: self.wanted)
        self.wanted = 0
        """KV columns that the first sequence waits for."""
        self._jobs: deque[ScoreJob] = deque()
        self._began = False
        """Something was read since the start: before that the reader has no arrays."""

    @property
    def busy(self) -> bool:
        return bool(self._jobs)

    @property
    def kind(self) -> Literal["scoring", "rewards"]:
        """Which share of a turn it gets: `rewards` if only rewards of rollout calls are queued, else `scoring`."""
        return "rewards" if self._jobs and all(job.owner for job in self._jobs) else "scoring"

    @property
    def cells(self) -> int:
        """KV columns it may come to fill."""
        return self._reader.cells if self._jobs else 0

    @property
    def nbytes(self) -> int:
        """KV memory it takes now, bytes."""
        return self._reader.nbytes if self._began else 0

    @property
    def own_requests(self) -> list[str]:
        """Ids of the requests that are nothing but a job."""
        return [job.id for job in self._jobs if job.group is None]

    def add(self, job: ScoreJob) -> None:
        self._jobs.append(job)
        self._began = True

    def fill(self, budget: int, *, crowded: bool, alone: bool) -> list[View]:
        """Lets what is open into the reader, as far as about `budget` tokens ask for it, and returns what is read next.
        `crowded`: rows wait for KV memory; `alone`: no row has any."""
        self.wanted = 0
        with self._blame(self):
            self._fill(budget, crowded, alone)
            return self._reader.views(budget)

    def advance(self, budget: int) -> int:
        """Reads about `budget` tokens of what the reader has; returns how many."""
        with self._blame(self):
            left = self._reader.left
            ended = self._reader.read(budget)
            tokens = left - self._reader.left
        for sequence in ended:
            sequence.job.reading -= 1
            sequence.job.open -= 1
            if sequence.fault is not None:
                self._fail(sequence.job, sequence.fault)
        for job in [job for job in self._jobs if not job.open]:
            self._close(job)
            job.finished(tuple(sequence.scored for sequence in job.sequences))
        return tokens

    def _fill(self, budget: int, crowded: bool, alone: bool) -> None:
        waiting = deque(job for job in self._jobs if job.prefixes)
        while waiting:
            job = waiting.popleft()
            if job.reading and self._reader.left >= budget:
                continue
            prefix = next((each for each in job.prefixes if not each.joining and not self._reader.awaits(each)), None)
            if prefix is None:
                continue
            count = self._room(prefix, budget, crowded, alone)
            if not count:
                return
            job.reading += count
            self._reader.begin(prefix, count)
            if not prefix.waiting:
                job.prefixes.remove(prefix)
            # Whoever had a turn stands behind the others in the next one.
            self._jobs.remove(job)
            self._jobs.append(job)
            waiting.append(job)

    def _room(self, prefix: SharedPrefix, budget: int, crowded: bool, alone: bool) -> int:
        """How many sequences of one shared prefix may join now."""
        reader = self._reader
        cells = reader.cells_with(1, prefix.length)
        if reader.size and (crowded or not self._ledger.fits(scoring=cells)):
            return 0
        if not (reader.size or alone or self._ledger.fits(scoring=cells)):
            self.wanted = cells
            return 0
        left, count = reader.left + len(prefix.prompt.tokens) - prefix.prompt.prefilled, 0
        for sequence in prefix.waiting:
            if reader.size + count >= reader.limit:
                break
            if count and (
                left >= budget or crowded or not self._ledger.fits(scoring=reader.cells_with(count + 1, prefix.length))
            ):
                break
            left, count = left + prefix.own(sequence), count + 1
        return count

    # ---- endings --------------------------------------------------------------------------------------------------

    def end(self, id: str, reason: str) -> None:
        """Ends the jobs of a request. Rows that are held for its values are reported without them, by others."""
        for job in [job for job in self._jobs if id in (job.id, job.owner)]:
            self._reader.drop(job)
            self._close(job)
            if job.group is None:
                job.failed(EngineUnavailable(f"The request was ended ({reason}) before it was scored."))

    def fail(self, error: RolloutError) -> None:
        """A forward failed: the jobs that were in it fail by name. Where the tower failed at a picture before anything
        was computed, only those that are being read and show it do."""
        failed = [job for job in self._jobs if job.reading]
        if pictures := self._blame.of(Picture):
            failed = [job for job in failed if job.shows(pictures)]
        else:
            self._reader.reset()
        for job in failed:
            self._fail(job, error)

    def _fail(self, job: ScoreJob, error: RolloutError) -> None:
        if job in self._jobs:
            self._reader.drop(job)
            self._close(job)
            job.failed(error)

    def _close(self, job: ScoreJob) -> None:
        self._jobs.remove(job)
        for version in job.versions:
            self._policies.release(version, 1)
