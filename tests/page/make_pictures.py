"""Takes the pictures of docs/pictures: the demo's model is trained against a server, and the page looks on.

`make pictures`, or `python -m tests.page.make_pictures`, where Chromium and selenium are.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rollout_server.demo.run import model_directory, run_trainer, serving
from tests.page.browser import Browser, browser, missing
from trainer_client import RolloutClient, TrainerClientError

PLACE = Path(__file__).parents[2] / "docs" / "pictures"
STEPS = 8
TRAINING_S = 400.0
"""How long any stage of it may take, on a machine that does ten other things."""
WIDTH, HEIGHT = 1280, 860
NEVER = 1
"""The demo's end token: its answers are over in ten tokens."""
ALL = ["text", "entropy", "base_logprobs", "sampling_logprobs"]


@contextmanager
def long_rows(url: str) -> Iterator[None]:
    """Rows that go on from version to version, as those of asynchronous training do, while the context lasts."""
    over = threading.Event()

    def sample() -> None:
        with RolloutClient(url) as client:
            while not over.is_set():
                try:
                    client.rollouts(
                        ["12+30=", "7+8=", "5+61="],
                        policy="policy",
                        n=12,
                        max_tokens=120,
                        temperature=0.6,
                        top_p=0.8,
                        on_update="switch",
                        logit_bias={NEVER: -100.0},
                        returns=ALL,
                    )
                except TrainerClientError:
                    time.sleep(1)  # nothing was pushed yet, or the server is stopping

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()


def take(url: str, trainer: threading.Thread) -> None:
    with browser(width=WIDTH, height=HEIGHT) as page:
        page.open(url)
        page.until(lambda: len(page.all(".card")) >= 5, TRAINING_S)
        page.until(lambda: page.all("#rows .cell") and page.all("#rollouts li"), TRAINING_S)
        for scheme in ("light", "dark"):
            page.prefer(scheme)
            page.picture(PLACE / f"page-{scheme}.png")
        page.prefer("light")
        switched(page)
        page.picture(PLACE / "page-rollout.png", ".rollouts")
        trainer.join()
        page.run("document.getElementById('prompt').value = '12+30='; document.getElementById('n').value = 3")
        page.click("#ask")
        page.until(lambda: len(page.all(".answer")) == 6)
        page.picture(PLACE / "page-two-versions.png", "section:last-of-type")
        page.resize(400, HEIGHT)
        page.run("scrollTo(0, 0)")
        page.picture(PLACE / "page-narrow.png")


def switched(page: Browser) -> None:
    """Chooses a rollout in which the version changes, once there is one."""
    choose = (
        "const of_two = (entry) => entry.querySelectorAll('.version').length > 1;"
        "[...document.querySelectorAll('#rollouts li')].find(of_two)?.click();"
        "return document.querySelector('#rollout .mark') !== null"
    )
    page.until(lambda: page.run(choose), TRAINING_S)
    page.run(
        "document.querySelector('#rollout .token').dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))"
    )


def main() -> None:
    if (why := missing()) is not None:
        sys.exit(why)
    PLACE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder) / "server.log") as url, long_rows(url):
        arguments = ["--url", url, "--model", str(model_directory()), "--output", folder, "--steps", str(STEPS)]
        trainer = threading.Thread(target=run_trainer, args=(arguments,))
        trainer.start()
        take(url, trainer)


if __name__ == "__main__":
    main()
