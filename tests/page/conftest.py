"""One server and one browser for all that look at the page; every test has a policy of its own name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rollout_server.demo.run import model_directory
from tests.page.browser import Browser, browser, missing
from tests.support import tiny_models
from tests.support.live_server import LiveServer, live_server
from trainer_client import PublishedVersion, RolloutClient

REQUIRED = "TEST_PAGE_REQUIRED"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a browser there is nothing to look with, and every test says what is missing; where `REQUIRED` is set, as
    in CI that has one, that is a failure."""
    why = missing()
    if why is not None and os.environ.get(REQUIRED):
        raise pytest.UsageError(f"{REQUIRED} is set, and there is no browser: {why}.")
    for item in items:
        if why is not None and item.path.is_relative_to(__file__.removesuffix("conftest.py")):
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server(None) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[RolloutClient]:
    with RolloutClient(server.url) as made:
        yield made


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as running:
        yield running


@pytest.fixture
def page(chromium: Browser, server: LiveServer) -> Iterator[Browser]:
    """The page, opened anew. Whatever a test did: nothing failed in the console."""
    chromium.resize(1280, 900)
    chromium.prefer("light")
    chromium.open(server.url)
    yield chromium
    assert chromium.complaints() == []


@pytest.fixture
def push(client: RolloutClient) -> Callable[..., PublishedVersion]:
    layers = tiny_models.linear_layers(model_directory())

    def send(name: str, seed: int, **options: Any) -> PublishedVersion:
        return client.push(name, *tiny_models.random_adapter(layers, 4, seed), **options)

    return send
