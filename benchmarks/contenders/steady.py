"""Rows of an engine while all of them decode and nothing is read: what a step takes, however they got there."""

from __future__ import annotations

import time
from collections.abc import Sequence

from benchmarks.contenders.engine import Engine, sampling_of
from rollout_server.engine.messages.rollouts import TokensSampled
from rollout_server.rollout import PolicyAddress, RolloutRequest, SamplingParams, Wants

GROUP = 8
"""Samples of one prompt, so that little is read before rows decode."""
SLACK = 4
"""The other rows may sample so many times the tokens of the watched one: none ends while it is watched."""


class SteadyRows:
    """`rows` rows of `engine` behind the given prompts, each used for up to eight of them, in groups that take the
    policies in turn. `kind` is how rows sample, see `engine.sampling_of`.

    The row that is admitted last is watched: from its first token to its last every row gets one token a step. The
    others are aborted then."""

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        rows: int,
        steps: int,
        *,
        policies: Sequence[PolicyAddress] = (PolicyAddress("base"),),
        kind: str = "",
        name: str = "engine",
    ) -> None:
        self.name = name
        self._engine = engine
        self._rows = rows
        self._steps = steps
        sizes = [GROUP] * ((rows - 1) // GROUP) + ([(rows - 1) % GROUP] if (rows - 1) % GROUP else []) + [1]
        self._watched = len(sizes) - 1
        self._groups = []
        for index, size in enumerate(sizes):
            watched = index == self._watched
            length = steps + 1 if watched else SLACK * (steps + 1)
            self._groups.append(
                RolloutRequest(
                    id="bench",
                    prompt_ids=tuple(prompts[index % len(prompts)]),
                    sampling=SamplingParams(max_tokens=length, ignore_eos=True, **sampling_of(kind, index, len(sizes))),
                    policy=policies[index % len(policies)],
                    n=size,
                    prompt_index=index,
                    seeds=tuple(range(GROUP * index, GROUP * index + size)),
                    wants=Wants(tokens_as_they_come=watched),
                )
            )

    def run(self) -> tuple[int, float]:
        return self._engine.wait_for(self._decode())

    async def _decode(self) -> tuple[int, float]:
        began: float | None = None
        seconds, seen = 0.0, 0
        subscription = self._engine.handle.submit("bench", self._groups)
        async for event in subscription:
            if not isinstance(event, TokensSampled) or seen > self._steps:
                continue
            began = began or time.perf_counter()
            seen += len(event.token_ids)
            if seen > self._steps:
                seconds = time.perf_counter() - began
                subscription.abort("abort")
        if seen != self._steps + 1:
            raise RuntimeError(f"The watched row got {seen} tokens where {self._steps + 1} were asked for.")
        return self._rows * self._steps, seconds
