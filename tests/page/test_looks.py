"""The page for everyone: both themes, a narrow window, the keyboard alone, and keys."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from rollout_server.demo.run import model_directory
from tests.page.browser import Browser
from tests.support import tiny_models
from tests.support.live_server import LiveServer, live_server, until
from trainer_client import PublishedVersion, RolloutClient

Push = Callable[..., PublishedVersion]
TAB, HOME, LEFT, RIGHT = "\ue004", "\ue011", "\ue012", "\ue014"
READABLE = 4.5
"""WCAG's least contrast of text."""
TEXTS = ("body", ".facts dt", ".facts dd", ".unit", "h2", ".pill", "button", ".badge", ".live", ".mark")
ON_HUES = (".live", ".mark")
"""Texts on the colours of versions, which have any hue."""


DRAWN = (
    "const context = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});"
    "const paint = (colour, share) => {"
    "context.globalAlpha = share; context.fillStyle = colour; context.fillRect(0, 0, 1, 1); };"
    "const seen = () => `rgb(${[...context.getImageData(0, 0, 1, 1).data].slice(0, 3)})`;"
)
"""The browser's own red, green and blue of colours that lie over each other."""
HEATS = [0, 0.25, 0.5, 0.75, 1]


def channels(colour: str) -> list[float]:
    """Red, green and blue from 0 to 1, of what a browser computes."""
    numbers = [float(number) for number in re.findall(r"[\d.]+", colour)]
    return numbers[:3] if colour.startswith("color(") else [number / 255 for number in numbers[:3]]


def luminance(colour: str) -> float:
    parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in channels(colour)]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


def contrast(page: Browser, selector: str) -> float:
    """Between a text and everything that lies below it, as opaque as each is."""
    text, ground = page.run(
        f"{DRAWN} const found = document.querySelector(arguments[0]); const all = []; let share = 1;"
        "for (let e = found; e; e = e.parentElement) all.unshift(getComputedStyle(e));"
        "for (const style of all) paint(style.backgroundColor, (share *= Number(style.opacity)));"
        "const ground = seen(); paint(all.at(-1).color, share); return [seen(), ground]",
        selector,
    )
    one, other = sorted((luminance(text), luminance(ground)))
    return (other + 0.05) / (one + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_both_themes(page: Browser, push: Push, scheme: str) -> None:
    push("themes", 1)
    page.find("[data-version='themes@1']")
    page.prefer(scheme)
    page.run("const e = document.createElement('span'); e.className = 'mark'; document.querySelector('main').append(e)")
    for hue in range(0, 360, 15):
        for text in ON_HUES:
            page.run("document.querySelector(arguments[0]).style.setProperty('--hue', arguments[1])", text, hue)
            assert contrast(page, text) >= READABLE, (text, hue)
    page.driver.execute_async_script(
        "const [heats, done] = arguments; import('/page/files/tokens.js').then(({ tokenText }) => {"
        "const token = (heat, given) => ({ text: 'a', logprob: -6 * heat, values: {}, version: ['themes', 1], given });"
        "const tokens = heats.flatMap((heat) => [token(heat, false), token(heat, true)]);"
        "const text = tokenText(tokens, 'all heats'); text.id = 'heats'; document.querySelector('main').append(text);"
        "}).then(done)",
        HEATS,
    )
    tokens = {at: contrast(page, f"#heats [data-at='{at}']") for at in range(2 * len(HEATS))}
    assert min(tokens.values()) >= READABLE, tokens
    assert {text: contrast(page, text) >= READABLE for text in TEXTS} == dict.fromkeys(TEXTS, True)
    assert (luminance(page.run("return getComputedStyle(document.body).backgroundColor")) > 0.5) == (scheme == "light")


def test_a_person_s_theme_wins_and_stays(page: Browser, server: LiveServer) -> None:
    page.prefer("light")
    for word in ("Light", "Dark"):
        page.click("#theme")
        assert word in page.text("#theme")
    page.open(server.url)
    assert luminance(page.run("return getComputedStyle(document.body).backgroundColor")) < 0.1
    page.click("#theme")


@pytest.mark.parametrize("width", [400, 800])
def test_nothing_is_cut_off_where_it_is_narrow(page: Browser, client: RolloutClient, push: Push, width: int) -> None:
    push("narrow", 1, label="a label that is as long as labels can be, which is 64 letters !")
    client.rollouts(["1+1="], policy="narrow", n=1, max_tokens=30, ignore_eos=True)
    page.resize(width, 800)
    page.find("[data-version='narrow@1']")
    page.until(lambda: page.all("#rollout .token"))
    assert page.run("return document.documentElement.scrollWidth") <= width
    beyond = page.run(
        "return [...document.querySelectorAll('main *, header *')].filter((e) => e.getBoundingClientRect().right >"
        " innerWidth + 1 && getComputedStyle(e).position !== 'absolute').map((e) => e.tagName + '.' + e.className)"
    )
    assert beyond == []


def test_the_keyboard_reaches_everything_in_the_order_of_the_page(
    page: Browser, client: RolloutClient, push: Push
) -> None:
    push("keys", 1), push("keys", 2)
    plot = "Throughput over time: the arrow keys tell the values"
    client.rollouts(["1+1="], policy="keys", n=1, max_tokens=4)
    page.until(lambda: page.all("#rollout .token"))
    page.until(lambda: "live" in page.text("[data-version='keys@2'] .badges"))
    seen: list[str] = []
    unseen: list[str] = []
    for _ in range(200):
        page.driver.switch_to.active_element.send_keys(TAB)
        at, outline = page.run(
            "const e = document.activeElement;"
            "const lane = e.className === 'track' && `track ${e.ariaLabel.split(':')[0]}`;"
            "return [lane || e.id || e.ariaLabel || e.className || e.tagName, getComputedStyle(e).outlineStyle]"
        )
        if at in ("BODY", "HTML") or (seen and at == seen[0]):
            break
        seen.append(at)
        unseen += [at] if outline == "none" else []
    wanted = ["skip", "theme", plot, "rows", "track keys", "Activate keys@1", "Delete keys@1", "rollouts"]
    wanted += ["prompt", "left", "right", "n", "ask"]
    assert [name for name in seen if name in wanted] == wanted
    assert unseen == [], "focus is seen"
    page.run("scrollTo(0, 0)")  # the head of the page stays where it is seen
    tops = page.run(
        "return arguments[0].map((id) => document.getElementById(id).getBoundingClientRect().top)",
        ["theme", "rows", "timeline", "rollouts", "prompt", "left", "ask"],
    )
    assert tops == sorted(tops), "the order of tabs is the order of the page"


def test_the_arrow_keys_tell_what_pointing_at_a_picture_does(
    page: Browser, server: LiveServer, client: RolloutClient, push: Push
) -> None:
    pushed = [push("arrows", seed).version for seed in (1, 2)]
    found: list[object] = []
    body = {"policy": "arrows", "n": 3, "max_tokens": 1800, "ignore_eos": True}
    thread = threading.Thread(target=lambda: found.append(client.rollouts(["1+1="], **body)))
    thread.start()
    # The page shows them once a second, and a fast machine may be done by then.
    until(lambda: httpx.get(f"{server.url}/health").json()["running"] == 3)
    client.pause("keep")
    try:
        page.until(lambda: len(page.all("#rows .cell")) == 3)
        page.find("#rows").send_keys(RIGHT, RIGHT)
        assert re.fullmatch(r"\S+: \d+ of 1800 tokens, arrows@2", page.text("#rows-said"))
        place = "return [...document.querySelectorAll('#rows .cell')].findIndex((e) => e.matches('.current'))"
        assert page.run(place) == 1
        before = page.text("#rows-said")
    finally:
        client.resume()
    page.until(lambda: page.text("#rows-said") != before)  # It tells what the row is now.
    thread.join()
    page.until(lambda: page.text("#rows-said") == "")  # A row that is over is not told of.
    page.run("document.activeElement.blur()")
    assert page.text("#rows-said") == ""
    page.until(lambda: page.run("return document.querySelectorAll('.track').length"))
    tracks = page.run("return [...document.querySelectorAll('.track')]")
    track = next(track for track in tracks if track.get_attribute("aria-label").startswith("arrows:"))
    track.send_keys(HOME)
    said = [page.text("#timeline-said")]
    for _ in range(3):
        track.send_keys(RIGHT)
        said.append(page.text("#timeline-said"))
    kinds = sorted(re.sub(r" (at|from) .*", "", text) for text in said)
    assert kinds == sorted(f"arrows@{number} {what}" for number in pushed for what in ("live", "pushed"))
    plot = page.find(".plot")
    plot.send_keys(LEFT)
    newest = page.text(".tile .said")
    plot.send_keys(LEFT)
    before = page.text(".tile .said")
    assert all(re.fullmatch(r"\d+:\d\d:\d\d · sampled [\d.]+( k)?", text) for text in (newest, before))
    assert newest != before
    frames = "return Number(document.documentElement.dataset.frames)"
    seen = page.run(frames)
    page.until(lambda: page.run(frames) > seen + 1)
    assert page.text(".tile .said") == before, "it stays while frames come"


# ---- keys -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked() -> Iterator[LiveServer]:
    keys = {"ROLLOUT_API_KEY": "may-infer", "ROLLOUT_ADMIN_KEY": "may-change"}
    with live_server(None, environment=keys) as server, RolloutClient(server.url, api_key="may-change") as client:
        layers = tiny_models.linear_layers(model_directory())
        for seed in (1, 2):
            client.push("locked", *tiny_models.random_adapter(layers, 2, seed))
        yield server


def give(page: Browser, key: str) -> None:
    page.until(lambda: page.run("return document.getElementById('key-dialog').open"))
    page.find("#key-value").send_keys(key)
    page.click("#key-form .primary")


def test_a_key_is_asked_for_and_what_it_does_not_open_stays_shut(chromium: Browser, locked: LiveServer) -> None:
    page = chromium
    page.resize(1280, 900)
    page.driver.get(locked.url)
    give(page, "wrong")
    assert page.text("#base") == ""
    give(page, "may-infer")
    page.find("[data-version='locked@2']")
    page.click("button[aria-label='Activate locked@1']")
    page.until(lambda: "ROLLOUT_ADMIN_KEY" in page.text("#key-why"))
    give(page, "may-change")
    page.until(lambda: "live" in page.text("[data-version='locked@1'] .badges"))
    assert "may-change" not in page.driver.page_source
    complaints = page.complaints()
    assert complaints and all("401" in text or "403" in text for text in complaints)
    page.run("sessionStorage.clear()")


def test_whoever_gives_no_key_is_not_asked_again_and_may_give_one_later(chromium: Browser, locked: LiveServer) -> None:
    page = chromium
    page.resize(1280, 900)
    page.driver.get(locked.url)
    opened = "return document.getElementById('key-dialog').open"
    page.until(lambda: page.run(opened))
    page.click("#key-cancel")
    page.until(lambda: not page.run(opened))
    # It had asked again after half a second.
    time.sleep(2)
    assert not page.run(opened)
    assert page.text("#state") == "locked" and "needs a key" in page.text("#notice-text")
    page.click("#theme"), page.click("#theme"), page.click("#theme")
    page.click("#give-key")
    give(page, "may-infer")
    page.find("[data-version='locked@2']")
    page.until(lambda: page.text("#state") == "ready")
    assert not page.find("#notice").is_displayed()
    assert all("401" in text for text in page.complaints())
    page.run("sessionStorage.clear()")
