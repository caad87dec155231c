"""Ways that the same rows can take through the engine. Whoever generates by one is sure that it was taken."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from rollout_server.engine.batch.length_buckets import StepCosts
from rollout_server.engine.batch.prefix_reuse import LEAST
from rollout_server.engine.kv_cache.padded_layer import Attend, DecodeAttention
from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.model.attention.choice import ChosenAttention
from rollout_server.engine.model.attention.plain import attend_plainly
from rollout_server.engine.model.forward.functions import modules_of
from rollout_server.engine.model.resident import ResidentModel
from rollout_server.rollout import Rollout
from tests.support.engine.driver import Driver
from tests.support.engine.loaded_models import loaded


class Way:
    """One step ahead, nothing compiled, nothing known from before, all rows together and room for them."""

    def start(self, path: Path, model: ResidentModel) -> Driver:
        return Driver.start(path, model, max_batch=16, prefill_tokens=96)

    def before(self, driver: Driver, prompts: Sequence[Sequence[int]]) -> None:
        """Whatever must have happened before they are asked for."""

    def after_turn(self, driver: Driver) -> None:
        """Acts on the engine, or looks at it."""

    def taken(self, driver: Driver, rows: Sequence[Rollout]) -> bool:
        return True

    def generate(self, driver: Driver, prompts: Sequence[Sequence[int]], **options: Any) -> list[Rollout]:
        self.before(driver, prompts)
        id = driver.submit(prompts, **options)
        for _ in range(2000):
            if driver.over(id):
                break
            driver.turn()
            self.after_turn(driver)
        assert driver.error(id) is None, driver.error(id)
        rows = driver.rollouts(id)
        assert self.taken(driver, rows), f"{type(self).__name__} was not taken"
        return rows


def compiled(path: Path) -> ResidentModel:
    """The model at `path`, whose decode steps are traced."""
    if mx.default_device() == mx.cpu and not shutil.which("g++"):
        pytest.skip("MLX compiles for the CPU with g++")
    return loaded(EngineOptions(str(path), path.name, max_batch=16, prefill_tokens=96, compile_decode=True))


class Compiled(Way):
    def start(self, path: Path, model: ResidentModel) -> Driver:
        return super().start(path, compiled(path))

    def __init__(self) -> None:
        self._traces = 0

    def after_turn(self, driver: Driver) -> None:
        self._traces = max(self._traces, driver.traces(driver.batch(0)).made)

    def taken(self, driver: Driver, rows: Sequence[Rollout]) -> bool:
        return self._traces > 0


def with_own_columns(model: ResidentModel, attend: Attend = attend_plainly) -> ResidentModel:
    """The model as a device serves it that has a kernel, with `attend` in the kernel's place."""
    assert isinstance(model.make_store, partial)
    attention = ChosenAttention(attend, modules_of(model.module))
    return replace(model, make_store=partial(model.make_store, attend=attend), attention=attention)


class OwnColumns(Way):
    """Steps attend as the cache says, each row to its own columns, and are dispatched before the last one was read.
    `attend` computes it."""

    def __init__(self, attend: Attend = attend_plainly) -> None:
        super().__init__()
        self._attend_by = attend
        self._attended = 0

    def _attend(self, step: DecodeAttention) -> tuple[mx.array, mx.array, mx.array]:
        self._attended += 1
        return self._attend_by(step)

    def start(self, path: Path, model: ResidentModel) -> Driver:
        return super().start(path, with_own_columns(model, self._attend))

    def taken(self, driver: Driver, rows: Sequence[Rollout]) -> bool:
        return self._attended > 0 and super().taken(driver, rows)


class OwnColumnsCompiled(OwnColumns):
    def __init__(self, attend: Attend = attend_plainly) -> None:
        super().__init__(attend)
        self._traces = 0

    def start(self, path: Path, model: ResidentModel) -> Driver:
        return super().start(path, compiled(path))

    def after_turn(self, driver: Driver) -> None:
        super().after_turn(driver)
        self._traces = max(self._traces, driver.traces(driver.batch(0)).made)

    def taken(self, driver: Driver, rows: Sequence[Rollout]) -> bool:
        return self._traces > 0 and super().taken(driver, rows)


class Settled(Way):
    """Every step is read before the next one is built."""

    def __init__(self) -> None:
        self._settled = 0

    def after_turn(self, driver: Driver) -> None:
        self._settled += driver.in_flight(driver.batch(0))
        driver.settle()

    def taken(self, driver: Driver, rows: Sequence[Rollout]) -> bool:
        return self._settled >= max(len(row.token_ids) for row in rows)


class Preempted(Way):
    """Once all rows run their memory is cut: some step aside and are read again."""

    def __init__(self) -> None:
        self._most = 0

    def after_turn(self, driver: Driver) -> None:
        batch = driver.batches
        if self._most == 0 and batch.size > 1 and not batch.joining and driver.status.steps > 3:
            self._most = batch.cells_after_step * 2 // 3
            driver.set_kv_limit(self._most)

    def taken(self, driver: Driver, rows: Sequence[Rollout]) -> bool:
        return driver.status.preemptions > 0


class PrefixHit(Way):
    def before(self, driver: Driver, prompts: Sequence[Sequence[int]]) -> None:
        driver.generate(prompts, seed=99, max_tokens=2, ignore_eos=True)

    def taken(self, driver: Driver, rows: Sequence[Rollout]) -> bool:
        return driver.status.prefix.hits > 0 and all(
            row.cached_tokens == len(row.prompt_ids) - 1 for row in rows if len(row.prompt_ids) > LEAST
        )


class Classes(Way):
    """Short and long rows have batches of their own."""

    def __init__(self) -> None:
        self._most = 0

    def start(self, path: Path, model: ResidentModel) -> Driver:
        driver = super().start(path, model)
        driver.set_step_costs(StepCosts(weights=0.0, cell=1.0))
        return driver

    def after_turn(self, driver: Driver) -> None:
        self._most = max(self._most, driver.batches.classes(0))

    def taken(self, driver: Driver, rows: Sequence[Rollout]) -> bool:
        return self._most > 1


class OwnColumnsPreempted(OwnColumns, Preempted):
    """As on a GPU whose memory is full."""


class OwnColumnsPrefixHit(OwnColumns, PrefixHit):
    """As on a GPU that has read a prompt before."""


class OwnColumnsCompiledPreempted(OwnColumnsCompiled, Preempted): ...


class OwnColumnsCompiledPrefixHit(OwnColumnsCompiled, PrefixHit): ...
