"""Pictures of a request are held against its limits by what their heads say, and each is made ready once."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import pytest
from litestar.testing import TestClient

from rollout_server.config import ServerConfig
from rollout_server.text.pictures.decode import decoded, measured
from rollout_server.text.pictures.kept import KeptPictures
from rollout_server.text.pictures.picture import Picture
from rollout_server.text.pictures.reader import Measure
from tests.support.http.fake_engine import CONTEXT, FakeEngine
from tests.support.http.fixtures import MakeApp
from tests.support.pictures.files import bomb, drawn, saved

SIDE = 24
PIXELS = SIDE**2
MOST_PIXELS = 4 * PIXELS
EACH = 100
"""Placeholders of a picture of the side above."""


class Reader:
    """Says of a picture how large it is, and counts how often one is decoded."""

    def __init__(self) -> None:
        self.read_sizes: list[tuple[int, int]] = []

    def measure(self, data: bytes, most_pixels: int) -> Measure:
        width, height = measured(data, most_pixels)
        return Measure(width * height, width * height * EACH // PIXELS)

    def read(self, data: bytes, most_pixels: int) -> Picture:
        image = decoded(data, most_pixels)
        self.read_sizes.append(image.size)
        return Picture(f"sha256:{len(data):064x}", image.tobytes(), (*image.size, 3), image.size, EACH)

    def expand(self, text: str, pictures: Sequence[Picture]) -> str:
        return text


@pytest.fixture
def config() -> ServerConfig:
    return ServerConfig(max_request_pixels=MOST_PIXELS)


@pytest.fixture
def reader(engine: FakeEngine) -> Reader:
    engine.pictures = reader = Reader()
    return reader


def url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def picture(seed: int) -> str:
    return url(saved(drawn(SIDE, SIDE, seed=seed)))


def scored(client: TestClient[Any], *images: list[str]) -> Any:
    sequences = [{"token_ids": [1, 2, 3], "images": each} for each in images]
    return client.post("/v1/logprobs", json={"policy": "base", "sequences": sequences})


def test_a_picture_is_made_ready_once_in_a_request_and_again_in_none(client: TestClient[Any], reader: Reader) -> None:
    first = picture(1)
    # Of another URL, and the same bytes.
    again = first.replace("data:image/png", "data:application/octet-stream")
    assert scored(client, [first, first], [again], *[[first]] * 20).status_code == 200
    assert len(reader.read_sizes) == 1
    assert scored(client, [first], [picture(2)]).status_code == 200
    assert len(reader.read_sizes) == 2


def test_pixels_of_a_request_are_counted_over_all_of_it(
    client: TestClient[Any], reader: Reader, engine: FakeEngine, problem: Any
) -> None:
    four, five = [[[picture(seed)] for seed in range(count)] for count in (4, 5)]
    assert scored(client, *four, *four).status_code == 200
    error = problem(scored(client, *five), 400, "invalid_field", "sequences[4].images[0]")
    assert "--max-request-pixels" in error["message"] and f"{5 * PIXELS} pixels" in error["message"]
    prompts = [{"token_ids": [1], "images": each} for each in five]
    reply = client.post("/v1/rollouts", json={"policy": "base", "prompts": prompts})
    problem(reply, 400, "invalid_field", "prompts[4].images[0]")
    assert not engine.submitted


def test_pictures_that_fill_the_context_are_refused_before_they_are_decoded(
    made_app: MakeApp, engine: FakeEngine, reader: Reader, problem: Any
) -> None:
    # Decoded it would be said to be broken.
    large = bomb(1_000)
    with TestClient(made_app(ServerConfig(), engine)) as client:
        error = problem(scored(client, [picture(1), url(large)]), 400, "context_length_exceeded", "sequences[0].images")
        assert f"the context holds {CONTEXT}" in error["message"] and not reader.read_sizes
        many = [picture(seed) for seed in range(CONTEXT // EACH + 1)]
        problem(scored(client, many), 400, "context_length_exceeded", "sequences[0].images")
        assert not reader.read_sizes
        assert scored(client, many[1:]).status_code == 200


def test_what_is_kept_is_bounded_by_its_pixels_and_the_oldest_goes_first() -> None:
    made: list[int] = []

    def make(number: int, size: int) -> Picture:
        made.append(number)
        return Picture(f"sha256:{number:064x}", bytes(size), (size,), (1, 1), 1)

    kept = KeptPictures(100)

    def get(number: int, size: int = 40) -> Picture:
        return kept.get(bytes([number]), lambda: make(number, size))

    first = get(1)
    get(2)
    assert get(1) is first and made == [1, 2] and kept.nbytes == 80
    get(3)
    assert kept.nbytes == 80 and get(1) is first and made == [1, 2, 3]
    get(2)
    assert made == [1, 2, 3, 2]
    # One that is larger than all that may be kept makes nobody leave.
    assert len(get(9, 101).pixels) == 101 and kept.nbytes == 80
