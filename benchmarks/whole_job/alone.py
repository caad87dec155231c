"""What the parts of a trainer's step take alone, in our engine in this process: reading prompts, and decoding."""

from __future__ import annotations

import time
from dataclasses import dataclass

from benchmarks.contenders.engine import Engine
from benchmarks.contenders.steady import SteadyRows
from benchmarks.whole_job.job import Job
from rollout_server.rollout import PolicyAddress, RolloutRequest, SamplingParams


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens a second."""

    prefill: float
    decode: float

    def seconds(self, job: Job) -> float:
        """A step's, if each of its parts ran as fast as alone."""
        return job.read / self.prefill + job.sampled / self.decode


class PartsAlone(Engine):
    """`rows` decode behind prompts of the job's length, to the length of its rows; and the job's prompts are read while
    nothing decodes. No prompt is kept for later."""

    def __init__(self, job: Job, rows: int) -> None:
        super().__init__(job.model, rows, prefix_cache=False)
        self._job = job
        self._rows = SteadyRows(self, job.ids(0), rows, job.tokens - 1)

    def rates(self, number: int) -> Rates:
        """Right after each other, so that drift of the machine hits both. `number` is that of other prompts."""
        tokens, seconds = self._rows.run()
        decode = tokens / seconds
        began = time.perf_counter()
        self.rollouts([self._first_token(index, ids) for index, ids in enumerate(self._job.ids(number))])
        # One token of each prompt is sampled, which is what tells that it was read.
        reading = time.perf_counter() - began - self._job.prompts / decode
        return Rates(self._job.read / reading, decode)

    @staticmethod
    def _first_token(index: int, ids: list[int]) -> RolloutRequest:
        return RolloutRequest(
            id="bench",
            prompt_ids=tuple(ids),
            sampling=SamplingParams(max_tokens=1, ignore_eos=True),
            policy=PolicyAddress("base"),
            prompt_index=index,
            seeds=(index,),
        )
