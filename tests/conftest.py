"""Loads the BLAS first: whatever is collected after this may import mlx."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from rollout_server import logs
from rollout_server.machine.blas import load_fast_blas
from rollout_server.open_files import import_mlx_lm
from tests.laws import marks

LONG_S = 600
"""Seconds for a test that is `long`, unless it says how many it needs."""

BLAS = load_fast_blas()
import_mlx_lm()  # or it takes down the limit of open files, also of what is started here

# The same cases in every run and nothing kept between runs; `--hypothesis-profile=long --timeout=0` looks further, at
# random, and `--hypothesis-seed=N` then repeats it.
settings.register_profile(
    "short",
    max_examples=100,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("long", settings.get_profile("short"), max_examples=2000, derandomize=False, print_blob=True)
settings.load_profile("short")


def pytest_report_header() -> str:
    return str(BLAS)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marks.mark(items)
    marks.heaviest_first(items)
    for item in items:
        if item.get_closest_marker("long") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(LONG_S))


def pytest_sessionstart() -> None:
    gc.disable()


def pytest_collection_finish() -> None:
    """Modules and tests stay to the end: the collector need not look at them between tests, half a second each time."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A command that a test runs in this process says where the log goes; the tests after it do not inherit that."""
    loggers = [logging.getLogger(name) for name in logs.CONFIGURED]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, state in zip(loggers, before, strict=True):
        logger.handlers, logger.level, logger.propagate = state
