"""What the page shows of a fleet, while one of its replicas is killed and comes back."""

from __future__ import annotations

import os
import signal

from rollout_server.demo.run import model_directory
from tests.page.browser import Browser
from tests.support import tiny_models
from tests.support.live_server import live_server
from trainer_client import RolloutClient


def fact(page: Browser, card: str, word: str) -> str:
    """What stands behind a word on a card."""
    words, values = page.all(f"{card} dt"), page.all(f"{card} dd")
    return {one.text: other.text for one, other in zip(words, values, strict=True)}[word]


def test_a_server_of_one_engine_has_no_section_for_replicas(page: Browser) -> None:
    assert not page.find("#replicas-section").is_displayed()


def test_it_shows_the_replicas_of_a_fleet_and_what_becomes_of_them(chromium: Browser) -> None:
    with live_server(None, "--replicas", "2") as fleet, RolloutClient(fleet.url) as client:
        chromium.resize(1280, 900)
        chromium.open(fleet.url)
        chromium.until(lambda: len(chromium.all("[data-replica] .badge.on")) == 2)
        assert chromium.text("#replicas-count") == "2 of 2 live, at least 1 must be live"
        client.push("policy", *tiny_models.random_adapter(tiny_models.linear_layers(model_directory()), 4, 1))
        lost = client.fleet()[0]
        shown = f"[data-replica='{lost.id}']"
        chromium.until(lambda: fact(chromium, shown, "versions") == "1")
        chromium.until(lambda: fact(chromium, shown, "process") == str(lost.pid))
        os.kill(lost.pid or 0, signal.SIGKILL)
        chromium.until(lambda: "dead" in chromium.text(shown) or "joining" in chromium.text(shown))
        chromium.until(lambda: fact(chromium, shown, "restarts") == "1" and "live" in chromium.text(shown), 120)
        assert chromium.complaints() == []
        # It would complain of a server that has gone.
        chromium.driver.get("about:blank")
