"""This project's engine, driven through the handle that HTTP uses, without HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from benchmarks.measure import Load
from rollout_server.engine.handle import EngineHandle
from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.messages.rollouts import RowFinished, TokensSampled
from rollout_server.rollout import PolicyAddress, Rollout, RolloutRequest, SamplingParams, Wants

T = TypeVar("T")
TOP_P, MIXED, PENALTIES, EXTRAS = "top-p by row", "filters mixed", "penalties", "entropy, top 5"


def sampling_of(kind: str, row: int, rows: int) -> dict[str, Any]:
    """How row number `row` of `rows` is sampled, beyond temperature 1."""
    share = {"top_p": 0.9 + 0.1 * row / max(1, rows - 1)}
    if kind == MIXED:
        return (share, {"top_k": 50}, {"min_p": 0.05}, {"top_p": 0.95, "top_k": 20, "min_p": 0.01})[row % 4]
    if kind == PENALTIES:
        return {"presence_penalty": 0.5, "frequency_penalty": 0.2, "repetition_penalty": 1.1}
    return share if kind == TOP_P else {}


class Engine:
    """An engine with its own copy of the model on its own thread, from enter to exit."""

    def __init__(self, directory: Path, max_batch: int, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self.handle = EngineHandle(
            EngineOptions(model_path=str(directory), model_id=directory.name, max_batch=max_batch, **options)
        )

    def __enter__(self) -> Self:
        self._runner.run(self._start())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.run(self.handle.close())
        self._runner.close()

    def wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)

    def rollouts(self, groups: list[RolloutRequest]) -> list[Rollout]:
        """Every row of the groups, in the order in which they ended."""
        return self.wait_for(self._rollouts(groups))

    async def _start(self) -> None:
        self.handle.start()
        await self.handle.wait_ready()

    async def _rollouts(self, groups: list[RolloutRequest]) -> list[Rollout]:
        return [e.rollout async for e in self.handle.submit("bench", groups) if isinstance(e, RowFinished)]


class EngineDecode(Engine):
    """Temperature 1 with `logprobs`, `sampling_logprobs` and `log_kept_mass` of every token, as every row returns them.

    The first row reports its tokens as they come, to start the clock; it is admitted first, so a row that joined later
    counts against us.
    """

    def __init__(
        self,
        directory: Path,
        prompts: list[list[int]],
        load: Load,
        *,
        kind: str = "",
        compile_decode: bool | None = None,
        kv_bits: int | None = None,
    ) -> None:
        self.name = f"engine, {kind}" if kind else "engine" if compile_decode is None else "engine, not compiled"
        self._load = load
        prefill_tokens = load.rows * load.prompt_tokens
        options = {"compile_decode": compile_decode, "kv_bits": kv_bits}
        super().__init__(directory, load.rows, prefill_tokens=prefill_tokens, **options)
        self._groups = [self._group(row, prompt, kind) for row, prompt in enumerate(prompts)]

    def run(self) -> tuple[int, float]:
        return self.wait_for(self._decode())

    def _group(self, row: int, prompt: list[int], kind: str) -> RolloutRequest:
        extras = kind == EXTRAS
        length = self._load.steps + 1
        return RolloutRequest(
            id="bench",
            prompt_ids=tuple(prompt),
            sampling=SamplingParams(max_tokens=length, ignore_eos=True, **sampling_of(kind, row, self._load.rows)),
            policy=PolicyAddress("base"),
            prompt_index=row,
            seeds=(row,),
            wants=Wants(tokens_as_they_come=row == 0, entropy=extras, top_logprobs=5 if extras else 0),
        )

    async def _decode(self) -> tuple[int, float]:
        begin, tokens = None, 0
        async for event in self.handle.submit("bench", self._groups):
            if isinstance(event, TokensSampled) and begin is None:
                begin = time.perf_counter()
            elif isinstance(event, RowFinished):
                tokens += len(event.rollout.token_ids)
        end = time.perf_counter()
        expected = self._load.tokens + self._load.rows
        if begin is None or tokens != expected:
            raise RuntimeError(f"The engine returned {tokens} tokens where {expected} were asked for.")
        return self._load.tokens, end - begin
