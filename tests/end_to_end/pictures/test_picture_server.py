"""The whole way: a vision model behind HTTP. Chat, rollouts, ids with images and the client show the same picture, and
whatever reads the tokens again sees it."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import mlx.core as mx
import numpy as np
import pytest

from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.model.load import load
from tests.support.golden_vision import copied, whole_logits
from tests.support.live_server import Server, server_here, uncut
from tests.support.numbers.bounds import assert_near
from tests.support.pictures.files import READABLE, UNREADABLE, bomb, drawn, mutated, saved
from tests.support.pictures.seeing import DEEPEST, MOST
from trainer_client import RolloutClient
from trainer_client.errors import InvalidField

pytestmark = uncut("models that see pictures")
FAMILY = "qwen2_5_vl"
MOST_PIXELS, MOST_BYTES, MOST_PICTURES = 4096, 40_000, 3


def url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


PICTURE, OTHER = saved(drawn(40, 24)), saved(drawn(40, 24, seed=8))


def shown(*urls: str, text: str = "what is it?", ending: str = "") -> list[dict[str, Any]]:
    parts = [{"type": "image_url", "image_url": {"url": each}} for each in urls]
    return [{"role": "user", "content": [{"type": "text", "text": text}, *parts, {"type": "text", "text": ending}]}]


class Served:
    def __init__(self, server: Server, directory: Path) -> None:
        self.server, self.directory = server, directory
        self.http = httpx.Client(base_url=server.url, timeout=120)
        self.client = RolloutClient(server.url)

    def ask(self, path: str, **body: Any) -> Any:
        reply = self.http.post(path, json=body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def refused(self, path: str, **body: Any) -> dict[str, Any]:
        reply = self.http.post(path, json=body)
        assert reply.status_code == 400, reply.text
        error: dict[str, Any] = reply.json()["error"]
        assert error["message"].endswith(".") and not error["retryable"]
        return error

    def rollout(self, **prompt: Any) -> Any:
        sampling = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
        fields = {"policy": "base", "sampling": sampling, "return": ["prompt_logprobs", "base_logprobs"]}
        return self.ask("/v1/rollouts", prompts=[prompt], **fields)["rollouts"][0]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = copied(FAMILY, tmp_path_factory.mktemp("pictures") / FAMILY)
    limits = {"max_picture_pixels": MOST_PIXELS, "max_picture_bytes": MOST_BYTES, "max_pictures": MOST_PICTURES}
    with server_here(directory, allow_image_host=("127.0.0.1",), **limits) as server:
        yield Served(server, directory)


def test_a_picture_is_read_as_the_plain_whole_forward_reads_it(served: Served) -> None:
    row = served.rollout(messages=shown(url(PICTURE), ending="say."))
    model = load(EngineOptions(str(served.directory), "tiny"))
    assert model.eyes is not None and model.eyes.reader is not None
    picture, family = model.eyes.reader.read(PICTURE, MOST_PIXELS), model.eyes.family
    ids = row["prompt_token_ids"]
    assert ids.count(family.placeholder) == picture.tokens > 1
    pixels = np.frombuffer(picture.pixels, "<f4").reshape(picture.shape)
    features = family.features(mx.array(pixels), picture.grid)
    whole = ids + row["token_ids"]
    logits = whole_logits(model.module, family, whole, [features], [picture.grid], 50_000.0).astype(np.float64)
    logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    expected = logprobs[np.arange(len(whole) - 1), whole[1:]]
    within = min(MOST, DEEPEST.of_logprobs(expected, len(whole)))
    assert_near(row["prompt_logprobs"][1:], expected[: len(ids) - 1], within)
    assert_near(row["logprobs"], expected[len(ids) - 1 :], within)
    assert row["base_logprobs"] == row["logprobs"]


def test_chat_rollouts_and_ids_show_the_same_picture(served: Served) -> None:
    messages = shown(url(PICTURE), url(OTHER), ending="say.")
    fields = {"model": "base", "max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    chat = served.ask("/v1/chat/completions", messages=messages, **fields)
    row = served.rollout(messages=messages)
    ids = chat["prompt_token_ids"]
    assert ids == row["prompt_token_ids"] and chat["choices"][0]["token_ids"] == row["token_ids"]
    assert chat["usage"]["prompt_tokens"] == len(ids)
    images = [url(PICTURE), url(OTHER, "application/octet-stream")]
    beside = served.rollout(token_ids=ids, images=images)
    assert beside["token_ids"] == row["token_ids"]
    assert_near(beside["logprobs"], row["logprobs"], MOST)
    turned = served.rollout(token_ids=ids, images=images[::-1])
    assert np.max(np.abs(np.subtract(turned["prompt_logprobs"][1:], row["prompt_logprobs"][1:]))) > 0.01
    sequence = {"token_ids": ids + row["token_ids"], "start": len(ids), "images": images}
    (scored,) = served.ask("/v1/logprobs", policy="base", sequences=[sequence])["sequences"]
    assert_near(scored["logprobs"], row["logprobs"], MOST)
    # The log-probability of a token behind the pictures, as a reward of any decoder.
    fields = {"model": "base", "label_token_ids": row["token_ids"][:1]}
    for sequence in ({"token_ids": ids, "images": images}, {"messages": messages, "add_generation_prompt": True}):
        (reward,) = served.ask("/v1/rewards", sequences=[sequence], **fields)["rewards"]
        assert_near(reward["value"], row["logprobs"][0], MOST)
    assert all(card["vision"] for card in served.http.get("/v1/models").json()["data"])


def test_a_prefix_goes_on_behind_the_pictures(served: Served) -> None:
    row = served.rollout(messages=shown(url(PICTURE), ending="say."))
    prefix = {"token_ids": row["token_ids"][:3]}
    again = served.rollout(token_ids=row["prompt_token_ids"], images=[url(PICTURE)], prefix=prefix)
    assert again["token_ids"] == row["token_ids"]
    assert_near(again["logprobs"][3:], row["logprobs"][3:], MOST)


def test_the_client_shows_files_bytes_and_images_and_reads_its_rows_again(served: Served, tmp_path: Path) -> None:
    path = tmp_path / "it.png"
    path.write_bytes(PICTURE)
    prompts = [shown(url(PICTURE))]
    prompts += [
        [{"role": "user", "content": [{"type": "text", "text": "what is it?"}, {"type": "image", "image": image}]}]
        for image in (path, PICTURE, drawn(40, 24))
    ]
    for prompt in prompts:
        prompt[0]["content"].append({"type": "text", "text": "say."})
    batch = served.client.rollouts(prompts, n=3, max_tokens=8, seed=2, ignore_eos=True)
    assert len({tuple(row.prompt_token_ids.tolist()) for row in batch}) == 1
    assert all(row.images for row in batch)
    assert all(row.exact for row in served.client.replay(batch))
    scored = served.client.logprobs(batch)
    assert_near(scored.logprobs, batch.logprobs, MOST)
    (probed,) = served.client.probe(batch, batch.logprobs)
    assert probed.rescored.max_abs_difference is not None and probed.rescored.max_abs_difference < MOST
    streamed = list(served.client.stream_rollouts([prompts[1]], max_tokens=4))
    assert streamed[0].images == batch[3].images
    with pytest.raises(InvalidField):
        served.client.rollouts([[{"role": "user", "content": [{"type": "image", "image": b"no picture"}]}]])


class _Host(BaseHTTPRequestHandler):
    """Has a picture, a redirect to it, and one that is too large."""

    def do_GET(self) -> None:
        self.send_response({"/it.png": 200, "/large": 200}.get(self.path, 302))
        self.send_header("location", "/it.png")
        self.end_headers()
        self.wfile.write(PICTURE if self.path == "/it.png" else b"\0" * (MOST_BYTES + 1))

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


def test_pictures_are_fetched_from_an_allowed_host_alone(served: Served) -> None:
    with HTTPServer(("127.0.0.1", 0), _Host) as host:
        thread = Thread(target=host.serve_forever, daemon=True)
        thread.start()
        here = f"http://127.0.0.1:{host.server_port}"
        fetched = served.rollout(messages=shown(f"{here}/it.png", ending="say."))
        assert fetched["token_ids"] == served.rollout(messages=shown(url(PICTURE), ending="say."))["token_ids"]
        for path, said in (("moved", "answered 302"), ("large", "--max-picture-bytes")):
            assert (
                said
                in served.refused("/v1/chat/completions", model="base", messages=shown(f"{here}/{path}"))["message"]
            )
        host.shutdown()
        thread.join()
    for elsewhere in ("http://localhost/it.png", "https://example.com/it.png", "http://[::1/it.png"):
        said = served.refused("/v1/chat/completions", model="base", messages=shown(elsewhere))
        assert said["param"] == "messages[0].content[1].image_url.url"


WRONG: dict[str, tuple[str, str]] = {
    "a path": ("/etc/passwd", "nothing on this machine is opened"),
    "a file": ("file:///etc/passwd", "nothing on this machine is opened"),
    "no comma": ("data:image/png;base64", "comma"),
    "not base64": ("data:image/png;base64,@@@@", "base64"),
    "nothing": ("data:image/png;base64,", "no bytes"),
    "a sound": (url(b"RIFF", "audio/wav"), "audio/wav"),
    "no picture": (url(b"hello"), "none of PNG"),
    "cut off": (url(PICTURE[: len(PICTURE) // 2]), "broken"),
    "a bomb": (url(bomb()), "pixels"),
    "too many pixels": (url(saved(drawn(80, 60))), "--max-picture-pixels"),
    "too many bytes": (url(b"\0" * (MOST_BYTES + 5)), "--max-picture-bytes"),
} | {name: (url(data), "") for name, (data, _) in UNREADABLE.items() if data}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_picture_is_refused_by_its_place(served: Served, name: str) -> None:
    given, said = WRONG[name]
    chat = served.refused("/v1/chat/completions", model="base", messages=shown(url(PICTURE), given))
    assert chat["param"] == "messages[0].content[2].image_url.url" and said in chat["message"]
    beside = {"token_ids": [1, 2], "images": [given]}
    row = served.refused("/v1/rollouts", policy="base", prompts=[beside], sampling={"max_tokens": 4})
    assert row["param"] == "prompts[0].images[0]" and said in row["message"]


def test_pictures_and_placeholders_that_disagree_are_refused(served: Served) -> None:
    row = served.rollout(messages=shown(url(PICTURE), ending="say."))
    ids, mark = row["prompt_token_ids"], max(row["prompt_token_ids"], key=row["prompt_token_ids"].count)
    first = ids.index(mark)
    for wrong, images in (
        (ids, []),
        (ids, [url(PICTURE), url(PICTURE)]),
        ([id for id in ids if id != mark], [url(PICTURE)]),
        ([*ids, mark, 5], [url(PICTURE)]),
        (ids[:first] + ids[first + 1 :], [url(PICTURE)]),
        # As many, but not in one place.
        ([*ids[:first], mark, 5, *ids[first + 1 :]], [url(PICTURE)]),
        (ids[: first + ids.count(mark)], [url(PICTURE)]),
    ):
        prompt = {"token_ids": wrong, **({"images": images} if images else {})}
        served.refused("/v1/rollouts", policy="base", prompts=[prompt], sampling={"max_tokens": 4})
        sequence = {**prompt, "start": 0}
        if wrong[-1] != mark:
            served.refused("/v1/logprobs", policy="base", sequences=[sequence])
    many = shown(*[url(PICTURE)] * (MOST_PICTURES + 1))
    assert "--max-pictures" in served.refused("/v1/chat/completions", model="base", messages=many)["message"]
    spelled = shown(url(PICTURE), text="<|image_pad|>")
    assert "places" in served.refused("/v1/chat/completions", model="base", messages=spelled)["message"]
    for kind in ("input_audio", "audio_url", "audio", "input_video", "video_url", "video"):
        part = {"type": kind, kind: {"url": "x"}}
        said = served.refused("/v1/chat/completions", model="base", messages=[{"role": "user", "content": [part]}])
        assert kind in said["message"]
    for detail, status in (("auto", 200), ("high", 200), ("low", 400)):
        (message,) = shown(url(PICTURE), ending="say.")
        message["content"][1]["image_url"]["detail"] = detail
        body = {"model": "base", "messages": [message], "max_tokens": 1}
        assert served.http.post("/v1/chat/completions", json=body).status_code == status
    text = {"text": "hi", "images": [url(PICTURE)]}
    assert served.refused("/v1/rollouts", policy="base", prompts=[text])["param"] == "prompts[0].images"
    assert "does not read" in served.refused("/tokenize", messages=shown(url(PICTURE)))["message"]
    # Nothing of all this is left behind.
    assert served.rollout(messages=shown(url(PICTURE), ending="say."))["token_ids"] == row["token_ids"]


@pytest.mark.long  # A thousand requests.
def test_a_thousand_mutated_pictures_are_read_or_refused_and_change_nothing(served: Served) -> None:
    generator, before = np.random.default_rng(5), served.rollout(messages=shown(url(PICTURE), ending="say."))
    kinds, statuses = ["png", "jpeg", "webp", "still gif", "bmp"], set()
    for number in range(1000):
        data = mutated(READABLE[kinds[number % len(kinds)]], generator)
        body = {"model": "base", "messages": shown(url(data)), "max_tokens": 1}
        reply = served.http.post("/v1/chat/completions", json=body)
        statuses.add(reply.status_code)
        if reply.status_code != 200:
            error = reply.json()["error"]
            assert reply.status_code == 400, reply.text
            assert error["param"] == "messages[0].content[1].image_url.url" and error["message"].endswith(".")
    assert statuses == {200, 400}
    after = served.rollout(messages=shown(url(PICTURE), ending="say."))
    assert (after["token_ids"], after["logprobs"]) == (before["token_ids"], before["logprobs"])
