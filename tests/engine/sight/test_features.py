"""What a tower made of pictures is kept within what KV leaves, and made again where it had to go."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

from rollout_server.engine.messages.control import Release, Released
from rollout_server.engine.sight.features import SHARE, Eyes
from rollout_server.text.pictures.picture import Picture
from tests.support.pictures.seeing import Seeing, opened


@pytest.fixture(scope="module")
def seeing() -> Iterator[Seeing]:
    with opened("qwen3_vl") as found:
        yield found


def fresh(seeing: Seeing) -> Eyes:
    assert seeing.model.eyes is not None
    return Eyes(seeing.model.eyes.family, mx.float32, 64)


def pictures(seeing: Seeing, count: int) -> list[Picture]:
    (picture,) = seeing.conversations["one"].pictures
    generator = np.random.default_rng(2)
    found = []
    for number in range(count):
        pixels = generator.standard_normal(picture.shape).astype("<f4").tobytes()
        found.append(Picture(f"sha256:{number:064x}", pixels, picture.shape, picture.grid, picture.tokens))
    return found


def test_the_last_picture_stays_and_others_as_far_as_there_is_room(seeing: Seeing) -> None:
    eyes, shown = fresh(seeing), pictures(seeing, 4)
    first = eyes.look(shown[0])
    size = first.nbytes
    assert eyes.nbytes == size and eyes.look(shown[0]) is first and eyes.looked == 1
    eyes.look(shown[1])
    # No room was given yet.
    assert eyes.nbytes == size
    eyes.fit(-(-2 * size // 64))
    for picture in shown:
        eyes.look(picture)
    assert eyes.nbytes == 2 * size and eyes.cells * 64 >= eyes.nbytes
    again = eyes.look(shown[0])
    assert again is not first and mx.array_equal(again.embeddings, first.embeddings)
    eyes.fit(0)
    assert eyes.nbytes == size


def test_looking_ahead_is_bounded_by_the_tokens_that_are_read_next(seeing: Seeing) -> None:
    eyes, conversation = fresh(seeing), seeing.conversations["two"]
    eyes.fit(10_000)
    sight = eyes.sight(conversation.ids, conversation.pictures)
    assert sight is not None
    first = int(sight.columns[0])
    assert eyes.look_ahead([(sight, 0, len(conversation.ids))], first) == 0
    assert eyes.look_ahead([(sight, 0, len(conversation.ids))], first + 1) == 1
    assert eyes.look_ahead([(None, 0, 5), (sight, 0, len(conversation.ids))], len(conversation.ids) + 5) == 1
    assert eyes.look_ahead([(sight, 0, len(conversation.ids))], len(conversation.ids)) == 0


def test_features_fill_what_rows_and_prompts_leave_and_count_in_it(seeing: Seeing) -> None:
    driver, conversation = seeing.start(), seeing.conversations["two"]
    driver.generate([conversation.ids], pictures=[conversation.pictures], max_tokens=3)
    eyes = driver.model.eyes
    assert eyes is not None and eyes.looked == 2 and eyes.nbytes > 0
    assert driver.memory_now().kv_pictures == eyes.nbytes and driver.status.pictures.read == 2
    assert 0 < eyes.nbytes <= driver.kv_limit // SHARE * driver.model.info.kv_bytes_per_token
    driver.generate([conversation.ids], pictures=[conversation.pictures], max_tokens=3, n=4)
    assert eyes.looked == 2 and driver.status.pictures.kept == 2
    nbytes = eyes.nbytes
    driver.send(Release("free"))
    driver.turn()
    (released,) = [event for event in driver.events if isinstance(event, Released)]
    assert eyes.nbytes == 0 and released.kv_bytes >= nbytes and driver.status.pictures.kept == 0
    driver.set_kv_limit(0)
    driver.turn(3)
    assert eyes.nbytes <= eyes.look(conversation.pictures[0]).nbytes + eyes.look(conversation.pictures[1]).nbytes


@pytest.mark.parametrize("chunk", [7, 512], ids=["in chunks", "at once"])
def test_a_picture_counts_once_for_each_that_shows_it(seeing: Seeing, chunk: int) -> None:
    driver, conversation = seeing.start(prefill_tokens=chunk, prefix_cache=False), seeing.conversations["one"]
    found = []

    def counted() -> tuple[int, int]:
        driver.turn()
        return driver.status.pictures.read, driver.status.pictures.hits

    for _ in range(3):
        driver.generate([conversation.ids], pictures=[conversation.pictures], max_tokens=3)
        found.append(counted())
    assert found == [(1, 0), (1, 1), (1, 2)]
    driver.generate([conversation.ids] * 2, pictures=[conversation.pictures] * 2, max_tokens=3)
    assert counted() == (1, 4)
    driver.score([conversation.ids], pictures=(conversation.pictures,))
    assert counted() == (1, 5)
    assert driver.model.eyes is not None
    driver.model.eyes.clear()
    driver.generate([conversation.ids] * 2, pictures=[conversation.pictures] * 2, max_tokens=3)
    assert counted() == (2, 6), "one of two waits for no tower"


def test_arrays_of_idle_batches_give_way_to_features(seeing: Seeing) -> None:
    driver, conversation = seeing.start(prefix_cache=False), seeing.conversations["one"]
    options = {"pictures": [conversation.pictures], "max_tokens": 3}
    driver.generate([conversation.ids], **options)
    driver.turn()
    eyes, idle = driver.model.eyes, driver.batches.idle_cells
    assert eyes is not None and eyes.cells > 0 and idle > 0
    for limit, kept in ((idle + eyes.cells, idle), (idle + eyes.cells - 1, 0)):
        driver.set_kv_limit(limit)
        driver.generate([conversation.ids], **options)
        driver.turn()
        assert driver.batches.idle_cells == kept and eyes.status.kept == 1
