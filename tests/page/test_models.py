"""The page of a server of several models: one of them at a time, whichever a person chooses."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from rollout_server.demo.run import model_directory
from tests.page.browser import Browser
from tests.support import tiny_models
from tests.support.live_server import LiveServer, live_server
from trainer_client import RolloutClient

UP, DOWN = "\ue013", "\ue015"
MODELS = ["base", "judge", "draft"]
MARKUP = "<img src=x onerror=window.hacked=1>"


@pytest.fixture(scope="module")
def served() -> Iterator[LiveServer]:
    """Two models, which differ in what was pushed to them: `mine` to that of --model, `own` twice to the judge."""
    also = ["--also", f"judge={model_directory()}", "--also", f"draft={model_directory()}"]
    with live_server(None, *also) as server, RolloutClient(server.url) as client:
        layers = tiny_models.linear_layers(model_directory())
        client.push("mine", *tiny_models.random_adapter(layers, 4, 1))
        client.push("judge/own", *tiny_models.random_adapter(layers, 4, 2), label=MARKUP)
        client.push("judge/own", *tiny_models.random_adapter(layers, 4, 3))
        for policy, prompt in (("mine", "1+1="), ("judge/own", MARKUP)):
            client.rollouts([prompt], policy=policy, n=2, max_tokens=6, ignore_eos=True)
        yield server


@pytest.fixture
def page(chromium: Browser, served: LiveServer) -> Iterator[Browser]:
    chromium.resize(1280, 900)
    chromium.driver.get(served.url)
    chromium.run("sessionStorage.clear()")
    chromium.open(served.url)
    yield chromium
    assert chromium.complaints() == []


def cards(page: Browser) -> set[str]:
    return set(page.run("return [...document.querySelectorAll('[data-version]')].map((e) => e.dataset.version)"))


def choose(page: Browser, model: str) -> None:
    """By the keyboard alone. Letters would choose too, but those of two choices within a second are one word."""
    chosen = "return document.getElementById('model').value"
    steps = MODELS.index(model) - MODELS.index(page.run(chosen))
    page.find("#model").send_keys((DOWN if steps > 0 else UP) * abs(steps))
    assert page.run(chosen) == model


def test_a_model_is_chosen_and_everything_shown_is_its(page: Browser) -> None:
    assert page.find("#models").is_displayed()
    page.until(lambda: cards(page) == {"base", "mine@1"})
    page.until(lambda: "mine@1" in page.text("#rollouts"))
    choose(page, "judge")
    page.until(lambda: cards(page) == {"base", "own@1", "own@2"})
    page.until(lambda: page.text("#rollout pre") == MARKUP)
    assert "own@2" in page.text("#rollouts") and "mine" not in page.text("#rollouts") + page.text("#timeline")
    assert MARKUP in page.text("[data-version='own@1'] .badges"), "what clients sent is text"
    assert page.run("return [document.images.length, window.hacked ?? null]") == [1, None]
    options = page.run("return [...document.getElementById('right').options].map((option) => option.value)")
    assert options == ["base", "own@1", "own@2"]
    choose(page, "draft")
    page.until(lambda: cards(page) == {"base"})
    assert page.text("#rollouts") == "" and not page.all("#rollout .token")
    choose(page, "base")
    page.until(lambda: cards(page) == {"base", "mine@1"})


def test_a_rollout_that_comes_after_another_model_was_chosen_leaves_that_ones_room(page: Browser) -> None:
    """The reply of the model before is held back until the other's list is there."""
    page.until(lambda: page.text("#rollout pre") == "1+1=")
    page.run(
        "const real = window.fetch; window.held = true;"
        "window.fetch = async (path, options) => {"
        " if (String(path).startsWith('page/rollouts/') && window.held) {"
        " window.held = null; await new Promise((go) => (window.release = go)); }"
        " return real(path, options); };"
    )
    page.click("#rollouts li:nth-child(2)")
    page.until(lambda: page.run("return window.held === null"))
    choose(page, "judge")
    page.until(lambda: "own@2" in page.text("#rollouts"))
    page.run("window.release()")
    page.until(lambda: page.text("#rollout pre") == MARKUP)
    assert page.find("#rollouts li[aria-selected='true']").is_displayed()


def test_buttons_and_samples_are_of_the_chosen_model(page: Browser, served: LiveServer) -> None:
    choose(page, "judge")
    page.click("[data-version='own@1'] button[aria-label='Activate own@1']")
    page.until(lambda: "live" in page.text("[data-version='own@1'] .badges"))
    policy = httpx.get(f"{served.url}/v1/weights/own", params={"model": "judge"}).json()
    assert [kept["live"] for kept in policy["versions"]] == [True, False]
    page.find("#prompt").send_keys("12+30=")
    page.run("document.getElementById('left').value = 'base'; document.getElementById('right').value = 'own@2'")
    page.run("document.getElementById('n').value = 1; document.getElementById('max-tokens').value = 5")
    page.click("#ask")
    page.until(lambda: len(page.all(".answer")) == 2)
    assert [page.text(f"#{side}-answers h3") for side in ("left", "right")] == ["judge", "judge/own@2"]
    page.until(lambda: "12+30=" in page.text("#rollout pre"))


def test_the_choice_stays_in_its_tab_and_outlives_the_model(page: Browser, served: LiveServer) -> None:
    choose(page, "judge")
    page.until(lambda: "own@2" in cards(page))
    page.open(served.url)
    assert page.run("return document.getElementById('model').value") == "judge" and "own@2" in cards(page)
    page.run("sessionStorage.setItem('rollout-server-model', 'gone')")
    page.open(served.url)
    assert page.run("return document.getElementById('model').value") == "base" and "mine@1" in cards(page)
    assert all("404" in text for text in page.complaints()), "the browser's own word for it"


def test_it_is_not_cut_off_where_it_is_narrow(page: Browser) -> None:
    page.resize(400, 800)
    choose(page, "judge")
    page.until(lambda: "own@1" in cards(page))
    assert page.run("return document.documentElement.scrollWidth") <= 400
    box = page.run("const box = document.getElementById('model').getBoundingClientRect(); return [box.left, box.right]")
    assert 0 <= box[0] < box[1] <= 400
