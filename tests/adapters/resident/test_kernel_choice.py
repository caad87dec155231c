"""A kernel adds the products of adapters only where it was found right, alone and for layers that share a launch, and
faster; whatever else it is, adapters work as without it and the log says why."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from adapters.kernels.decode import DecodeKernel
from adapters.kernels.low_rank import LowRankKernel
from adapters.kernels.matrix import MatrixKernel
from adapters.kernels.text import Device, Launch, own_device
from adapters.resident.kernel_choice import choose_kernel, groups_of, kernels, proven

LAYERS = {"down_proj": (16, 40), "gate_proj": (40, 16), "k_proj": (24, 16), "q_proj": (48, 16), "up_proj": (40, 16)}
LAYERS |= {"v_proj": (24, 16)}


def a_block(layers: dict[str, tuple[int, int]], dtype: mx.Dtype = mx.float32) -> nn.Module:
    mx.random.seed(3)
    block = nn.Module()
    for name, (out, width) in layers.items():
        block[name] = nn.Linear(width, out, bias=name in ("q_proj", "k_proj", "v_proj"))
    block.set_dtype(dtype)
    return block


@dataclass(frozen=True)
class Asked:
    """What one launch is given."""

    layers: int
    rank: int
    slots: int
    gains: bool


@dataclass
class Plainly:
    """Makes launches that compute by plain products, compiled by nobody. Looked at as a clock, a second passes between
    two looks, and besides what `seconds` says of each launch; `spoilt` are launches that come out wrong."""

    seconds: Callable[[Asked], float] = lambda asked: -0.01
    spoilt: Callable[[Asked], bool] = lambda asked: False
    now: float = 0.0

    def clock(self) -> float:
        self.now += 1.0
        return self.now

    def __call__(
        self, device: Device, name: str, inputs: Sequence[str], outputs: Sequence[str], source: str, header: str
    ) -> Launch:
        def launch(*, inputs: Sequence[mx.array], names: Sequence[str] = inputs, **_: Any) -> list[mx.array]:
            given = dict(zip(names, inputs, strict=True))
            rows = mx.broadcast_to(given["rows"], given["x"].shape[:1])
            asked = Asked(len(outputs), given["a0"].shape[1], given["rows"].size, "gain0" in given)
            self.now += self.seconds(asked)
            found = [low_rank(given, rows, layer) for layer in range(len(outputs))]
            return [-found[0], *found[1:]] if self.spoilt(asked) else found

        return launch


def low_rank(given: dict[str, mx.array], rows: mx.array, layer: int) -> mx.array:
    x, y, a, b = (given[name] for name in ("x", f"y{layer}", f"a{layer}", f"b{layer}"))
    found = y + ((x @ a[rows].swapaxes(1, 2)) @ b[rows])[..., : y.shape[-1]]
    if f"gain{layer}" in given:
        found = found * given[f"gain{layer}"][rows][:, None]
    return found + given[f"bias{layer}"] if f"bias{layer}" in given else found


def tried(made: Plainly, layers: dict[str, tuple[int, int]] = LAYERS) -> LowRankKernel | None:
    return proven(DecodeKernel("cuda", made), a_block(layers), layers, mx.float32, made.clock)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], str]]:
    caplog.set_level(logging.INFO, logger="rollout_server.engine.model")
    yield lambda: caplog.messages[-1]


def test_a_kernel_that_is_right_and_faster_is_taken(said: Callable[[], str]) -> None:
    seen: set[Asked] = set()

    def noted(asked: Asked) -> float:
        seen.add(asked)
        return -0.01

    assert tried(Plainly(noted)) is not None
    assert said() == (
        "Adapters may go by threads: for 64 rows of several versions of ranks up to 16 a layer takes 10.000 ms by "
        "these, 20.000 by plain products."
    )
    texts = {(asked.layers, asked.rank, asked.gains) for asked in seen}
    assert texts == {(layers, rank, gains) for layers in (1, 2, 3) for rank in (8, 16) for gains in (False, True)}


def test_one_that_takes_no_such_layer_is_not_timed_against_itself(said: Callable[[], str]) -> None:
    """Six float32 numbers are no whole vectors of four."""
    assert tried(Plainly(), {"q_proj": (16, 6)}) is None
    assert said() == "Adapters do not go by threads, which take no such layer in this dtype."


@pytest.mark.parametrize(
    "slow, where",
    [
        (lambda asked: asked.rank == 8, "rows of one version of ranks up to 8"),
        (lambda asked: asked.rank == 16 and asked.slots == 1, "rows of one version of ranks up to 16"),
        (lambda asked: asked.slots > 1, "rows of several versions of ranks up to 16"),
    ],
)
def test_one_that_is_slower_anywhere_is_not(slow: Callable[[Asked], bool], where: str, said: Callable[[], str]) -> None:
    assert tried(Plainly(lambda asked: 0.01 if slow(asked) else -0.01)) is None
    assert said() == (
        f"Adapters do not go by threads: for 64 {where} a layer takes 30.000 ms by these, 20.000 by plain products."
    )


@pytest.mark.parametrize(
    "spoilt, where",
    [
        (lambda asked: True, "in down_proj, the output for rows of several versions of ranks up to 8 is "),
        (lambda asked: asked.rank == 16, "in down_proj, the output for rows of several versions of ranks up to 16 is "),
        (lambda asked: asked.slots == 1, "in down_proj, the output for rows of one version of ranks up to 8 is "),
        (lambda asked: asked.slots > 100, "in down_proj, the output for rows of several versions of ranks up to 8 is "),
        (lambda asked: asked.layers > 1, "in gate_proj + up_proj, the output for rows of several versions "),
        (lambda asked: asked.layers == 3, "in k_proj + q_proj + v_proj, the output for rows of several versions "),
        (lambda asked: asked.layers == 3 and asked.rank == 16, "in k_proj + q_proj + v_proj, "),
    ],
)
def test_one_that_is_wrong_is_not_used(spoilt: Callable[[Asked], bool], where: str, said: Callable[[], str]) -> None:
    assert tried(Plainly(spoilt=spoilt)) is None
    assert said().startswith(f"Adapters do not go by threads: {where}")


def test_one_that_cannot_be_compiled_ends_no_start(said: Callable[[], str]) -> None:
    def failing(asked: Asked) -> float:
        raise RuntimeError("identifier is undefined")

    assert tried(Plainly(failing)) is None
    assert said() == "Adapters do not go by threads: that ends in RuntimeError: identifier is undefined."


def test_every_kind_of_launch_is_tried_once() -> None:
    layers = {f"layers.{block}.{name}": shape for block in range(30) for name, shape in LAYERS.items()}
    model = nn.Sequential(*(a_block(LAYERS) for _ in range(30)))
    found = groups_of(model, layers)
    assert [tuple(path.removeprefix("layers.0.") for path in paths) for paths in found] == [
        ("down_proj",),
        ("gate_proj",),
        ("k_proj",),
        ("q_proj",),
        ("gate_proj", "up_proj"),
        ("k_proj", "q_proj"),
        ("k_proj", "v_proj"),
        ("q_proj", "v_proj"),
        ("k_proj", "q_proj", "v_proj"),
    ]


def test_where_there_is_nothing_to_add_or_no_gpu_there_is_none(caplog: pytest.LogCaptureFixture) -> None:
    assert tried(Plainly(), {}) is None
    if own_device() is None:
        assert choose_kernel(a_block(LAYERS), LAYERS, mx.float32) is None
    assert not caplog.messages


@pytest.mark.parametrize(
    "first, why", [(MatrixKernel, "matrix units, which take no such"), (DecodeKernel, "threads: in down_proj")]
)
def test_where_the_first_takes_no_such_layer_or_is_wrong_the_next_is_tried(
    first: type[MatrixKernel | DecodeKernel], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Matrix units take no float32."""
    caplog.set_level(logging.INFO, logger="rollout_server.engine.model")
    right = Plainly()
    tries: list[LowRankKernel] = [first("cuda", Plainly(spoilt=lambda asked: True)), DecodeKernel("cuda", right)]
    assert choose_kernel(a_block(LAYERS), LAYERS, mx.float32, tries, right.clock) is tries[1]
    assert caplog.messages[0].startswith(f"Adapters do not go by {why}")
    assert caplog.messages[-1].startswith("Adapters may go by threads")


@pytest.mark.skipif(own_device() is None, reason="needs a GPU")
def test_this_gpu_uses_it() -> None:
    layers = {"k_proj": (1024, 4096), "o_proj": (4096, 4096), "q_proj": (4096, 4096), "v_proj": (1024, 4096)}
    found = choose_kernel(a_block(layers, mx.bfloat16), layers, mx.bfloat16)
    assert found is not None and found.name == kernels()[0].name
