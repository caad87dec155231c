"""`server`, `model` and `numeric` are where they belong, through helpers, classes and modules too."""

from __future__ import annotations

import numpy as np

from tests.laws.marks import BOUNDS, MODELS, PROCESSES, reaches
from tests.random_runs.invariants import Promises
from tests.support import kill_nine
from tests.support.engine.driver import Driver
from tests.support.live_server import live_server
from tests.support.numbers.bounds import assert_near


def starts() -> None:
    with live_server(None):
        pass


def through_a_module() -> None:
    kill_nine.run(None, None, 1)  # type: ignore[arg-type]


def through_an_inner_function() -> None:
    def inner() -> None:
        starts()

    inner()


def through_a_class() -> None:
    Promises(None, None, 1)  # type: ignore[arg-type]


def loads() -> None:
    Driver.start(None)  # type: ignore[arg-type]


def compares() -> None:
    assert_near(np.zeros((1, 1)), np.zeros((1, 1)))


def neither() -> None:
    neither()


def test_what_starts_a_process_is_found() -> None:
    for function in (starts, through_a_module, through_an_inner_function):
        assert reaches([function], PROCESSES), function
    assert not any(reaches([function], PROCESSES) for function in (compares, neither, through_a_class))


def test_what_loads_a_model_is_found() -> None:
    assert reaches([loads], MODELS)
    assert not any(reaches([function], MODELS) for function in (compares, neither))


def test_what_compares_floats_is_found() -> None:
    assert reaches([compares], BOUNDS) and reaches([through_a_class], BOUNDS)
    assert not any(reaches([function], BOUNDS) for function in (starts, neither))
