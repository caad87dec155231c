"""The page in a real browser, over a real server: it follows what happens, and does what its buttons say."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.page.browser import Browser
from tests.support.live_server import LiveServer, live_server, until
from trainer_client import PublishedVersion, RolloutBatch, RolloutClient

Push = Callable[..., PublishedVersion]
MARKUP = "<img src=x onerror=window.hacked=1><script>window.hacked=1</script>"
UNHARMED = "return [document.images.length, document.scripts.length, window.hacked ?? null]"
MOST_NATS = 6


def card(name: str) -> str:
    return f"[data-version='{name}']"


def live(client: RolloutClient, name: str) -> int | None:
    return next(line.live for line in client.weights() if line.name == name)


def press(page: Browser, name: str, word: str) -> None:
    page.click(f"{card(name)} button[aria-label='{word} {name}']")


def test_it_shows_the_model_and_is_quiet(page: Browser) -> None:
    assert page.text("#state") == "ready" and page.text("#base").startswith("rollout-demo")
    assert "base" in page.text(card("base"))
    assert len(page.all(".tile svg path.line")) == 6
    assert page.driver.title == "rollout-server"


def test_it_follows_a_push(page: Browser, push: Push) -> None:
    pushed = push("follow", 1, label="first try")
    page.find(card("follow@1"))
    page.until(lambda: "live" in page.text(f"{card('follow@1')} .badges"))
    shown = page.text(card("follow@1"))
    assert "first try" in shown and pushed.digest[:19] in shown and "lora, rank 4, adapter" in shown
    assert f"{pushed.report['delta_norm']:.4f}" in shown
    assert page.find(f"{card('follow@1')} .bar").get_attribute("aria-label").startswith("Push: receive ")
    push("follow", 2)
    page.until(lambda: "live" in page.text(f"{card('follow@2')} .badges"))
    assert "live" not in page.text(f"{card('follow@1')} .badges")
    lanes = "return [...document.querySelectorAll('.track')].map((track) => track.ariaLabel).join()"
    page.until(lambda: "version 2 from" in page.run(lanes))


def test_it_shades_a_rollout(page: Browser, client: RolloutClient) -> None:
    """A token's shade is its surprise, up to the end of the scale; its numbers are those of the reply."""
    batch = client.rollouts(["12+30="], policy="base", n=1, max_tokens=24, temperature=2.0, ignore_eos=True, seed=7)
    ids, logprobs = batch.token_ids.tolist(), batch.logprobs.tolist()
    page.until(lambda: len(page.all("#rollout .token")) == len(ids))
    heats = page.run(
        "return [...document.querySelectorAll('#rollout .token')].map(t => t.style.getPropertyValue('--heat'))"
    )
    assert [float(heat) for heat in heats] == pytest.approx(
        [min(1, -value / MOST_NATS) for value in logprobs], abs=6e-4
    )
    drawn = "return [...document.querySelectorAll('#rollout .token')].map(t => getComputedStyle(t).backgroundColor)"
    shades = dict(zip(page.run(drawn), map(float, heats), strict=True))
    darkest = max(shades, key=lambda colour: float(colour.rpartition("/")[2].strip(" )")))
    assert len(shades) > 1 and shades[darkest] == max(map(float, heats)), "the most surprising is the darkest"
    page.run(
        "document.querySelector('#rollout .token').dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))"
    )
    assert f"{logprobs[0]:.3f}".replace("-", "−") in page.text("#rollout .values")
    page.find("#rollout .tokens").send_keys("\ue014")  # the right arrow
    values = page.text("#rollout .values")
    assert f"{logprobs[1]:.3f}".replace("-", "−") in values and f"id {ids[1]}" in values
    assert "12+30=" in page.text("#rollout pre")


def test_a_chosen_rollout_stays_when_its_tab_was_hidden(page: Browser, client: RolloutClient) -> None:
    """A hidden tab reads nothing, and one that is seen again begins with a whole frame."""
    for prompt in ("1+2=", "3+4="):
        client.rollouts([prompt], policy="base", n=1, max_tokens=4)
    page.until(lambda: page.text("#rollout pre") in ("1+2=", "3+4="))
    page.click("#rollouts li:nth-child(2)")
    page.until(lambda: page.text("#rollout pre") == "1+2=")
    frames = "return Number(document.documentElement.dataset.frames)"
    hide = (
        "Object.defineProperty(document, 'hidden', {value: arguments[0], configurable: true});"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    page.run(hide, True)
    before = page.run(frames)
    client.rollouts(["5+6="], policy="base", n=1, max_tokens=4)
    page.run(hide, False)
    page.until(lambda: page.run(frames) > before and len(page.all("#rollouts li")) >= 3)
    assert page.text("#rollout pre") == "1+2="
    assert page.find("#rollouts li[aria-selected='true'] .what").is_displayed()


def test_a_chosen_rollout_stays_until_the_newest_is_followed_again(page: Browser, client: RolloutClient) -> None:
    """Whichever was chosen: also the newest, and one that has made room for later ones."""
    client.rollouts(["9+1="], policy="base", n=1, max_tokens=4)
    page.until(lambda: page.text("#rollout pre") == "9+1=")
    assert not page.find("#follow").is_displayed()
    page.click("#rollouts li:first-child")
    assert page.find("#follow").is_displayed()
    chosen = page.find("#rollouts li[aria-selected='true']").get_attribute("id")
    client.rollouts(["9+2="], policy="base", n=40, max_tokens=4)
    page.until(lambda: not page.all(f"#{chosen}"))
    # As long as one that nobody chose is shown.
    time.sleep(5.5)
    assert page.text("#rollout pre") == "9+1="
    page.click("#follow")
    page.until(lambda: page.text("#rollout pre") == "9+2=")
    assert not page.find("#follow").is_displayed()
    client.rollouts(["9+3="], policy="base", n=1, max_tokens=4)
    page.until(lambda: page.text("#rollout pre") == "9+3=")


def test_a_server_that_goes_silent_is_said_to_be_and_found_again(chromium: Browser) -> None:
    """Its connections stay open, and nothing comes: whoever looks at the numbers would take them for new ones."""
    with live_server(None) as stopped:
        chromium.resize(1280, 900)
        chromium.open(stopped.url)
        assert chromium.text("#state") == "ready"
        stopped.process.send_signal(signal.SIGSTOP)
        try:
            chromium.until(lambda: chromium.text("#state") == "silent")
            said = chromium.text("#notice-text")
            assert "said nothing" in said and re.search(r"What is shown is of \d+:\d\d:\d\d", said)
        finally:
            stopped.process.send_signal(signal.SIGCONT)
        chromium.until(lambda: chromium.text("#state") == "ready")
        assert not chromium.find("#notice").is_displayed()
        assert chromium.complaints() == []
        # It would complain of a server that has gone.
        chromium.driver.get("about:blank")


def test_it_marks_where_the_version_changes(
    page: Browser, client: RolloutClient, server: LiveServer, push: Push
) -> None:
    push("moves", 1)
    found: list[RolloutBatch] = []

    def sample() -> None:
        found.append(
            client.rollouts(["1+1="], policy="moves", n=4, max_tokens=1500, on_update="switch", ignore_eos=True)
        )

    def health() -> Any:
        return httpx.get(f"{server.url}/health").json()

    before = health()["tokens"]
    thread = threading.Thread(target=sample)
    thread.start()
    # Each has tokens of the first version; the page shows them once a second, and a fast machine may be done by then.
    until(lambda: (said := health())["running"] == 4 and said["tokens"] >= before + 4)
    client.pause("keep")
    try:
        page.until(lambda: len(page.all("#rows .cell")) == 4)
        assert "4 on moves@1" in page.find("#rows").get_attribute("aria-label")
        push("moves", 2)
    finally:
        client.resume()
    thread.join()
    assert {span.version for span in found[0].spans[0]} == {1, 2}
    page.until(lambda: page.text("#rollout .mark") == "moves@2")
    assert page.text("#rollouts li .who") == "moves@1moves@2"
    page.until(lambda: not page.all("#rows .cell"))


def test_it_rolls_back_pins_and_deletes(page: Browser, client: RolloutClient, push: Push) -> None:
    push("back", 1), push("back", 2)
    page.until(lambda: "live" in page.text(f"{card('back@2')} .badges"))
    press(page, "back@1", "Activate")
    page.until(lambda: "live" in page.text(f"{card('back@1')} .badges"))
    assert live(client, "back") == 1
    press(page, "back@2", "Pin")
    page.until(lambda: "pinned" in page.text(f"{card('back@2')} .badges"))
    press(page, "back@2", "Unpin")
    page.until(lambda: "pinned" not in page.text(f"{card('back@2')} .badges"))
    press(page, "back@2", "Delete")
    page.click("#delete-cancel")
    assert page.all(card("back@2"))
    press(page, "back@2", "Delete")
    assert "back@2" in page.text("#delete-what")
    page.click("#delete-do")
    page.until(lambda: not page.all(card("back@2")))
    assert [kept.version for line in client.weights() if line.name == "back" for kept in line.versions] == [1]
    assert not page.find(f"{card('back@1')} button[aria-label='Delete back@1']").is_enabled(), "it is live"


def test_what_clients_sent_is_text(page: Browser, client: RolloutClient, server: LiveServer, push: Push) -> None:
    label = MARKUP[:64]
    push("hostile", 1, label=label)
    body = {"id": "<b>bold<b>", "policy": "hostile", "prompts": [{"text": MARKUP}], "sampling": {"max_tokens": 4}}
    assert httpx.post(f"{server.url}/v1/rollouts", json=body).status_code == 200
    page.until(lambda: page.text("#rollout .request") == "<b>bold<b>")
    assert page.text("#rollout pre") == MARKUP
    page.until(lambda: label in page.text(card("hostile@1")))
    assert page.run(UNHARMED) == [1, 1, None]


def test_what_models_say_is_text(page: Browser, client: RolloutClient, server: LiveServer) -> None:
    """A grammar has them say markup, in a rollout and in the box that asks two versions."""
    said = {"structured_outputs": {"choice": [MARKUP]}}
    body = {"policy": "base", "prompts": [{"text": "1+1="}], "sampling": {"max_tokens": 200, **said}}
    assert httpx.post(f"{server.url}/v1/rollouts", json=body).status_code == 200
    sampled = "return [...document.querySelectorAll(`${arguments[0]} .token`)].map((e) => e.textContent).join('')"
    page.until(lambda: MARKUP in page.run(sampled, "#rollout"))
    page.run(
        "const real = window.fetch; window.fetch = (path, options) => real(path, options?.method === 'POST'"
        " ? { ...options, body: JSON.stringify({ ...JSON.parse(options.body), ...arguments[0] }) } : options)",
        said,
    )
    page.find("#prompt").send_keys("1+1=")
    page.run("document.getElementById('n').value = 1; document.getElementById('max-tokens').value = 200")
    for chat in (False, True):
        page.run("document.getElementById('chat').checked = arguments[0]", chat)
        page.run("for (const side of ['left', 'right']) document.getElementById(`${side}-answers`).replaceChildren()")
        page.click("#ask")
        page.until(lambda: MARKUP in page.run(sampled, "#left-answers") and page.run(sampled, "#right-answers"))
    assert page.run(UNHARMED) == [1, 1, None]


def test_no_script_can_be_added(page: Browser) -> None:
    """Even one that runs here cannot: text is no script, and markup may not be written."""
    for attempt in (
        "const s = document.createElement('script'); s.textContent = 'window.hacked = 1'; document.body.append(s)",
        "document.body.innerHTML = '<img src=x>'",
        "document.body.append(document.createElement('script')); document.body.lastChild.src = 'data:,window.hacked=1'",
    ):
        said = page.run(f"try {{ {attempt}; return 'done' }} catch (error) {{ return error.name }}")
        assert said == "TypeError", attempt
    assert page.run("return window.hacked ?? null") is None
    assert all("TrustedHTML" in text or "TrustedScript" in text for text in page.complaints())


def test_two_versions_answer_side_by_side(page: Browser, client: RolloutClient, push: Push) -> None:
    """Each says what it says elsewhere: greedily, so that nothing is left to chance."""
    push("asked", 3), push("asked", 4)
    page.until(lambda: "asked@2" in page.text("#right"))
    page.run("document.getElementById('left').value = 'asked@1'; document.getElementById('right').value = 'asked@2'")
    page.find("#prompt").send_keys("12+30=")
    page.run("document.getElementById('temperature').value = 0; document.getElementById('n').value = 2")
    page.click("#ask")
    page.until(lambda: len(page.all(".answer")) == 4)
    versions = dict(zip(("left", "right"), ("asked@1", "asked@2"), strict=True))
    surprises = {
        side: page.run(
            "return [...document.querySelector(arguments[0]).querySelectorAll('.token')]"
            ".map((token) => Number(token.style.getPropertyValue('--heat')))",
            f"#{side}-answers .tokens",
        )
        for side in versions
    }
    assert surprises["left"] != surprises["right"], "they are two versions"
    for side, version in versions.items():
        batch = client.rollouts(["12+30="], policy=version, n=1, max_tokens=48, temperature=0.0)
        expected = [min(1, -value / MOST_NATS) for value in batch.logprobs.tolist()]
        assert surprises[side] == pytest.approx(expected, abs=6e-4)
        assert page.text(f"#{side}-answers h3") == version
    assert "tokens in" in page.text("#asked")
    page.run("document.getElementById('n').value = 1; document.getElementById('chat').checked = true")
    page.click("#ask")
    page.until(lambda: len(page.all(".answer")) == 2)


def test_a_refusal_is_said(page: Browser) -> None:
    page.find("#prompt").send_keys("1")
    page.run("document.getElementById('max-tokens').value = 4000")
    page.click("#ask")
    page.until(lambda: "max_tokens" in page.text("#notice"))
    assert any("400" in text for text in page.complaints()), "the browser's own word for it"


# ---- frames of servers that are larger, or other, than the one here --------------------------------------------------


def shown(page: Browser, change: str, show: str, look: str) -> Any:
    """What `look` finds right after `show` was given the server's frame with a `change`; the next frame undoes it."""
    script = (
        "const done = arguments[arguments.length - 1]; (async () => {"
        "const { Compare } = await import('/page/files/compare.js');"
        "const { showRows } = await import('/page/files/rows.js');"
        "const { Versions } = await import('/page/files/versions.js');"
        "const text = (id) => { const e = document.getElementById(id); return e.hidden ? null : e.textContent; };"
        "const compare = (frame) => Compare.prototype.show.call({ offer: Compare.prototype.offer }, frame);"
        f"const frame = await (await fetch('/page/state')).json(); {change}; {show}; done({look});"
        "})().catch((error) => done(String(error)))"
    )
    return page.driver.execute_async_script(script)


def test_what_is_not_shown_is_counted(page: Browser, push: Push) -> None:
    push("many", 1)
    change = "frame.policies[0].more = 9; frame.more_policies = 3"
    look = "text('versions-more')"
    assert shown(page, "", "new Versions().show(frame)", look) is None
    said = "and 9 older versions of these policies, and 3 more policies"
    assert shown(page, change, "new Versions().show(frame)", look) == said
    row = "requests: ['a'], rows: [[0, 1, 2, 0, 0]]"
    rows = f"const rows = {{ count: 600, versions: [['many', 1]], counts: [600], {row} }}"
    look = "[text('rows-more'), text('rows-legend'), document.getElementById('rows').ariaLabel]"
    found = shown(page, rows, "showRows(rows)", look)
    assert found == ["and 599 more", "many@1 · 600", "600 rows: 600 on many@1."]


def test_rows_have_the_colours_of_their_versions(page: Browser) -> None:
    """Those of the legend and of the versions' cards; no two versions here share one."""
    rows = (
        "const rows = { count: 4, versions: [['a', 1], ['a', 2], ['b', 1], ['base', 0]], counts: [1, 1, 1, 1],"
        "requests: ['r'], rows: [0, 1, 2, 3, 0].map((version) => [version, 1, 2, 0, 0]) };"
        "const colours = (of) => [...document.querySelectorAll(of)].map((e) => getComputedStyle(e).backgroundColor)"
    )
    cells, legend, card = shown(
        page,
        rows,
        "showRows(rows)",
        "[colours('#rows .filled'), colours('#rows-legend .swatch'), colours(\"[data-version='base'] .swatch\")]",
    )
    assert len(set(cells)) == 4 and cells[4] == cells[0]
    assert legend == cells[:4] and card == [cells[3]]


def test_rows_that_are_not_known_are_not_shown_as_none(page: Browser) -> None:
    look = (
        "[text('rows-count'), text('rows-old'), document.getElementById('rows').ariaLabel,"
        "document.querySelectorAll('#rows .cell').length,"
        "getComputedStyle(document.getElementById('rows'), '::after').content]"
    )
    none = "const none = { count: 0, versions: [], counts: [], requests: [], rows: [] }"
    busy, unknown = "the engine is busy", "The engine is busy: its rows are not known."
    late = "The engine has not shown its rows within 2 s."
    found = shown(page, none, "showRows(none); showRows(null)", look)
    assert found == [busy, late, unknown, 0, '"It is not known which rows run."']
    rows = "const rows = { count: 1, versions: [['a', 1]], counts: [1], requests: ['r'], rows: [[0, 1, 2, 0, 0]] }"
    found = shown(page, rows, "showRows(rows); showRows(null)", look)
    assert found == [busy, f"{late} These are what it showed last.", unknown, 1, "none"]
    found = shown(page, none, "showRows(null); showRows(none)", look)
    assert found == ["none is running", None, "No row is running.", 0, '"No row is running."']


def test_versions_of_a_long_run_can_be_told_apart(page: Browser, push: Push) -> None:
    """A day of pushes: over all of it a version would be narrower than a pixel."""
    push("days", 1)
    day = (
        "const now = frame.now[0]; frame.started = now - 86400;"
        "frame.policies = frame.policies.filter((policy) => policy.name === 'days');"
        "const moves = (name, count) => Array.from({ length: count }, (_, at) =>"
        " ({ name, number: at + 1, time: now - 86400 * (1 - at / count) }));"
    )
    look = (
        "[document.getElementById('timeline-shows')?.textContent,"
        "[...document.querySelectorAll('#timeline .live')].map((e) => e.getBoundingClientRect().width),"
        "document.querySelector('#timeline .track').ariaLabel]"
    )
    show = "new Versions().show(frame)"
    said, widths, label = shown(page, f"{day} frame.moves = moves('days', 480)", show, look)
    assert said.startswith("Which version was live: the last 64 changes, since ")
    assert len(widths) in (64, 65) and min(widths[-64:]) > 8
    assert "version 480 from" in label and "version 400 from" not in label
    change = f"{day} frame.moves = moves('days', 20)"
    said, widths, _ = shown(page, change, show, look)
    assert said == "Which version was live, since the server started" and len(widths) == 20
    _, widths, label = shown(page, f"{day} frame.moves = moves('other', 512)", show, look)
    assert len(widths) == 1 and "version 1 since before the first change" in label, (
        "what is not kept is not what was not"
    )
    both = f"{day} frame.moves = [...moves('other', 511), {{ name: 'days', number: 1, time: now - 60 }}]"
    _, widths, label = shown(page, both, show, look)
    assert len(widths) == 2 and "at first it is not known, version 1 from" in label


def test_a_model_that_samples_nothing_is_not_asked_to(page: Browser) -> None:
    look = "document.getElementById('compare-section').hidden"
    assert shown(page, "", "compare(frame)", look) is False
    assert shown(page, "frame.base.task = 'classify'", "compare(frame)", look) is True


def test_the_newest_live_version_is_offered_first(page: Browser, push: Push) -> None:
    """By when it was pushed, whatever its name."""
    push("zeta", 1), push("alpha", 1)
    page.until(lambda: "alpha@1" in page.text("#right"))
    page.open(page.driver.current_url)
    assert page.run("return document.getElementById('right').value") == "alpha@1"
