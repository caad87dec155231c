"""This project's engine, driven through the handle that HTTP uses, without HTTP."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import TracebackType

from benchmarks.measure import Load
from rollout_server.engine.handle import EngineHandle
from rollout_server.engine.messages import EngineOptions, RowFinished, TokensSampled
from rollout_server.rollout import PolicyAddress, RolloutRequest, SamplingParams, Wants


class EngineDecode:
    """Temperature 1 with `logprobs`, `sampling_logprobs` and `log_kept_mass` of every token, as every row returns them.

    A context manager: the engine's own copy of the model lives on its thread from enter to exit. The first row reports
    its tokens as they come, to start the clock; it is admitted first, so a row that joined later counts against us.
    """

    def __init__(self, directory: Path, prompts: list[list[int]], load: Load, *, top_p: bool = False) -> None:
        self.name = "engine, top-p by row" if top_p else "engine"
        self._load = load
        self._runner = asyncio.Runner()
        self._handle = EngineHandle(
            EngineOptions(
                model_path=str(directory),
                model_id=directory.name,
                max_batch=load.rows,
                prefill_tokens=load.rows * load.prompt_tokens,
            )
        )
        self._groups = [self._group(row, prompt, top_p) for row, prompt in enumerate(prompts)]

    def __enter__(self) -> EngineDecode:
        self._runner.run(self._start())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.run(self._handle.close())
        self._runner.close()

    def run(self) -> tuple[int, float]:
        return self._runner.run(self._decode())

    def _group(self, row: int, prompt: list[int], top_p: bool) -> RolloutRequest:
        share = 0.9 + 0.1 * row / max(1, self._load.rows - 1) if top_p else 1.0
        length = self._load.steps + 1
        return RolloutRequest(
            id="bench",
            prompt_ids=tuple(prompt),
            sampling=SamplingParams(max_tokens=length, temperature=1.0, top_p=share, ignore_eos=True),
            policy=PolicyAddress("base"),
            prompt_index=row,
            seeds=(row,),
            wants=Wants(tokens_as_they_come=row == 0),
        )

    async def _start(self) -> None:
        self._handle.start()
        await self._handle.wait_ready()

    async def _decode(self) -> tuple[int, float]:
        begin, tokens = None, 0
        async for event in self._handle.submit("bench", self._groups):
            if isinstance(event, TokensSampled) and begin is None:
                begin = time.perf_counter()
            elif isinstance(event, RowFinished):
                tokens += len(event.rollout.token_ids)
        end = time.perf_counter()
        expected = self._load.tokens + self._load.rows
        if begin is None or tokens != expected:
            raise RuntimeError(f"The engine returned {tokens} tokens where {expected} were asked for.")
        return self._load.tokens, end - begin
