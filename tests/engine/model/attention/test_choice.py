"""A kernel attends only where it was found right, for every kind of layer that a model has, and faster; whatever else
it is, the model keeps its own attention and the log says why."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import mlx.core as mx
import pytest
from mlx_lm.models.llama import Model, ModelArgs

from rollout_server.engine.kv_cache.padded_layer import Attend, DecodeAttention
from rollout_server.engine.model.attention.choice import (
    BEYOND,
    MOST_NUMBERS,
    TESTED_COLUMNS,
    UNBOUND,
    ChosenAttention,
    Trial,
    by_itself,
    choose_attention,
    proven,
    trials_of,
)
from rollout_server.engine.model.attention.kernel import FILLED, RowKernel
from rollout_server.engine.model.attention.plain import attend_plainly
from rollout_server.engine.model.forward.functions import modules_of
from rollout_server.engine.sampling.numerics import on_cpu
from tests.engine.model.attention.test_kernel import a_step
from tests.laws.grids import some_long
from tests.support.numbers.host_kernels import TEXTS, host_compiler

Attended = tuple[mx.array, mx.array, mx.array]
FASTER, SLOWER = -0.5, 0.5


@pytest.fixture(scope="module")
def module() -> Model:
    """Whose names are bound; nothing runs it."""
    return Model(ModelArgs("llama", 64, 1, 64, 1, 1e-5, 8))


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], str]]:
    caplog.set_level(logging.INFO, logger="rollout_server.engine.model")
    yield lambda: caplog.messages[-1]


@dataclass
class Clock:
    """A second passes between two looks at it, and besides what an attention takes that it counts."""

    now: float = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now

    def counting(self, attend: Attend, seconds: float) -> Attend:
        def counted(step: DecodeAttention) -> Attended:
            self.now += seconds
            return attend(step)

        return counted


def attending(*steps: DecodeAttention) -> Trial:
    """A model whose layers attend so."""

    def trial(attend: Attend, *, traced: bool) -> str | None:
        for step in steps:
            attend(replace(step, keys=step.keys + 0, values=step.values + 0))
        return None

    return trial


def tried(module: Model, kernel: Attend, *steps: DecodeAttention, seconds: float = FASTER) -> ChosenAttention:
    clock = Clock()
    return proven(clock.counting(kernel, seconds), module, attending(*steps or [a_step([3])]), clock=clock)


def test_a_kernel_that_is_right_and_faster_is_taken(module: Model, said: Callable[[], str]) -> None:
    found = tried(module, attend_plainly, a_step([3], sinks=True), a_step([3], window=24), a_step([3], packed=True))
    assert found.attend is not None and found.modules == modules_of(module) != ()
    assert said() == "Decode steps attend by a kernel: 500.00 ms a layer where mlx's own takes 1000.00."


def test_a_slower_one_is_not(module: Model, said: Callable[[], str]) -> None:
    assert tried(module, attend_plainly, seconds=SLOWER) is UNBOUND
    assert said() == ("Decode steps keep mlx's own attention: the kernel takes 1500.00 ms where it takes 1000.00 ms.")


def other_rows(step: DecodeAttention) -> Attended:
    found, keys, values = attend_plainly(step)
    return mx.roll(found, 1, axis=0), keys, values


def without_the_newest(step: DecodeAttention) -> Attended:
    found, _, _ = attend_plainly(replace(step, offset=mx.maximum(step.offset - 1, 0)))
    return found, *attend_plainly(step)[1:]


def that_does_not_write(step: DecodeAttention) -> Attended:
    kept = step.keys + 0, step.values + 0
    return attend_plainly(step)[0], *kept


def of_one_kind_of_head(step: DecodeAttention) -> Attended:
    found, keys, values = attend_plainly(step)
    return found * (1.0 if step.queries.shape[1] == 4 else 1.1), keys, values


def not_compiled(step: DecodeAttention) -> Attended:
    raise RuntimeError("error: identifier\n  is undefined" + " and so on" * 100)


@pytest.mark.parametrize(
    "kernel, why",
    [
        (other_rows, "the kernel computes something else here, by "),
        (without_the_newest, "the kernel computes something else here, by "),
        (of_one_kind_of_head, "heads=8"),
        (that_does_not_write, "what it should write is not there afterwards"),
        (not_compiled, "RuntimeError: error: identifier is undefined and so on"),
    ],
)
def test_one_that_is_wrong_or_cannot_be_compiled_is_not_used(
    kernel: Attend, why: str, module: Model, said: Callable[[], str]
) -> None:
    assert tried(module, kernel, a_step([3]), a_step([3], heads=8)) is UNBOUND
    assert said().startswith("Decode steps keep mlx's own attention: ") and why in said() and len(said()) < 500


def test_nor_one_under_which_the_model_says_something_else(module: Model, said: Callable[[], str]) -> None:
    step, runs = a_step([3]), []

    def trial(attend: Attend, *, traced: bool) -> str | None:
        attend(step)
        runs.append(traced)
        return "row 1 of three differs by 2 from itself alone" if traced else None

    assert proven(attend_plainly, module, trial, clock=Clock()) is UNBOUND
    assert said().endswith(": under the kernel row 1 of three differs by 2 from itself alone.")
    assert runs == [False, True], "as it is, then as its steps are run"


@pytest.mark.parametrize(
    "trial, why",
    [
        (lambda attend, traced: None, "no layer asks its cache to attend"),
        (lambda attend, traced: "row 0 differs", "the model does not attend as its cache expects (row 0 differs)"),
        (lambda attend, traced: str(attend(a_step([3], width=48))), "ValueError: its heads have 48 numbers"),
    ],
)
def test_a_model_that_no_kernel_is_for_keeps_its_own(
    trial: Trial, why: str, module: Model, said: Callable[[], str]
) -> None:
    assert proven(attend_plainly, module, trial, clock=Clock()) is UNBOUND
    assert said() == f"Decode steps keep mlx's own attention: {why}."


@pytest.mark.parametrize("stage", range(4))
def test_what_another_rank_finds_holds_for_all(stage: int, module: Model, said: Callable[[], str]) -> None:
    asked: list[str | None] = []

    def agreed(fault: str | None) -> str | None:
        asked.append(fault)
        return "another rank says so" if len(asked) > stage else fault

    clock = Clock()
    kernel = clock.counting(attend_plainly, FASTER)
    assert proven(kernel, module, attending(a_step([3])), agreed, clock) is UNBOUND
    assert said() == "Decode steps keep mlx's own attention: another rank says so."
    assert asked == [None] * (stage + 1), "and none goes on alone"


def wide_by(columns: int) -> Attend:
    """A window that is off by so many columns."""
    return lambda step: attend_plainly(replace(step, window=None if step.window is None else step.window + columns))


def blind(step: DecodeAttention) -> Attended:
    return attend_plainly(replace(step, window=None))


@pytest.mark.parametrize("kernel", [blind, wide_by(1), wide_by(-1)], ids=["none", "wider", "narrower"])
@pytest.mark.parametrize("packed", [False, True], ids=["numbers", "8 bits"])
@pytest.mark.parametrize("window", some_long([24, 382, 383, 510, 511, 1024, 16_384], 24, 511, 16_384))
def test_a_window_of_any_size_is_that_of_the_layer(
    window: int, packed: bool, kernel: Attend, module: Model, said: Callable[[], str]
) -> None:
    """In half precision, which rounds away what one column of many weighs."""
    step = a_step([3], window=window, dtype=mx.bfloat16, packed=packed)
    assert tried(module, kernel, step) is UNBOUND
    assert "computes something else here" in said() and f"window={window}" in said()


@pytest.mark.parametrize("window", [383, 511, 1024, 4096, 32_768, 131_072])
@pytest.mark.parametrize(("kv_heads", "width"), [(1, 256), (8, 128), (32, 64)])
@pytest.mark.parametrize("most", [2**24, MOST_NUMBERS])
def test_rows_end_on_both_sides_of_a_wide_window_and_are_bounded(
    window: int, kv_heads: int, width: int, most: int
) -> None:
    like = a_step([3], heads=32, kv_heads=kv_heads, width=width, window=window)
    trials = [(set(ends), len(ends), columns) for ends, columns in trials_of(like, most)]
    long = [trial for trial in trials if trial[2] > TESTED_COLUMNS]
    ends = set().union(*(each for each, _, _ in long))
    assert ends == {window - 1, window, window + 1, window + 1 + BEYOND, window + 2 + BEYOND}
    for _, rows, columns in long:
        assert columns == window + 3 + BEYOND
        assert rows == 1 or rows * kv_heads * columns * width <= most
    assert min(rows for _, rows, _ in long) == 1 and len(long) <= 6
    if window <= 4096 and most == MOST_NUMBERS:
        assert max(rows for _, rows, _ in long) * like.queries.shape[1] > FILLED // 2, "one block reads a row"


def test_layers_that_are_alike_are_tried_once(module: Model) -> None:
    calls: list[DecodeAttention] = []
    kinds = [a_step([3]), a_step([3], window=24)]

    def counted(step: DecodeAttention) -> Attended:
        calls.append(step)
        return attend_plainly(step)

    def trial(attend: Attend, *, traced: bool) -> str | None:
        return "that is enough" if traced else attending(*kinds * 20)(attend, traced=traced)

    assert proven(counted, module, trial, clock=Clock()) is UNBOUND
    assert len(calls) == sum(len(list(trials_of(kind))) for kind in kinds)


@pytest.mark.parametrize("packed", [False, True], ids=["numbers", "8 bits"])
@pytest.mark.parametrize("text", TEXTS)
def test_the_kernel_itself_reads_nothing_before_its_window(
    text: str, packed: bool, module: Model, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """By the processor, which is given few of the rows."""
    kernel = RowKernel(TEXTS[text], host_compiler(tmp_path_factory))

    def few(step: DecodeAttention) -> Attended:
        return kernel(step) if step.keys.shape[0] < 16 else attend_plainly(step)

    assert tried(module, few, a_step([3], window=400, packed=packed, sinks=True)).attend is not None


def test_where_there_is_no_gpu_or_no_wish_nothing_is_tried(module: Model, caplog: pytest.LogCaptureFixture) -> None:
    def trial(attend: Attend, *, traced: bool) -> str | None:
        raise AssertionError

    assert choose_attention(module, trial, wanted=False) is UNBOUND
    if on_cpu():
        assert choose_attention(module, trial, wanted=True) is UNBOUND
    assert not caplog.messages


@pytest.mark.skipif(on_cpu(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 1024, 4096])
def test_this_gpu_uses_it(window: int | None, module: Model) -> None:
    steps = [a_step([3], heads=32, kv_heads=8, width=128, dtype=mx.bfloat16, window=each) for each in {None, window}]
    assert choose_attention(module, attending(*steps), wanted=True, agreed=by_itself).attend is not None
