"""What a tower made of pictures is kept within what KV leaves, and made again where it had to go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from rollout_server.engine.messages.control import Release, Released
from rollout_server.engine.sight.features import SHARE, Eyes
from rollout_server.models.vision.family import Features, Grid, VisionFamily
from rollout_server.text.pictures.picture import Picture
from tests.support.pictures.seeing import Seeing, opened


@pytest.fixture(scope="module")
def seeing() -> Iterator[Seeing]:
    with opened("qwen3_vl") as found:
        yield found


@dataclass(frozen=True)
class SlowTower:
    """A family whose tower takes a second of the clock for each picture."""

    family: VisionFamily
    now: list[float]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.family, name)

    def features(self, pixels: mx.array, grid: Grid) -> Features:
        self.now[0] += 1.0
        return self.family.features(pixels, grid)


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


def test_pictures_stay_as_far_as_there_is_room(seeing: Seeing) -> None:
    eyes, shown = fresh(seeing), pictures(seeing, 4)
    first = eyes.look(shown[0])
    size = first.nbytes
    assert eyes.nbytes == 0 and eyes.looked == 1, "no room was given yet"
    eyes.fit(-(-2 * size // 64))
    for picture in shown:
        eyes.look(picture)
    assert eyes.nbytes == 2 * size and eyes.cells * 64 >= eyes.nbytes
    again = eyes.look(shown[0])
    assert again is not first and mx.array_equal(again.embeddings, first.embeddings)
    assert eyes.look(shown[0]) is again
    eyes.fit(0)
    assert eyes.nbytes == 0


def test_what_was_looked_at_stays_until_it_was_read_and_is_counted(seeing: Seeing) -> None:
    eyes, conversation = fresh(seeing), seeing.conversations["two"]
    sight = eyes.sight(conversation.ids, conversation.pictures)
    assert sight is not None
    whole = [(sight, 0, len(conversation.ids))]
    ahead = eyes.look_ahead("prefill", whole, len(conversation.ids))
    assert (ahead.pictures, ahead.tokens, ahead.complete) == (2, len(sight.columns), True)
    assert eyes.cells == 0 and eyes.awaited_cells * 64 >= eyes.nbytes > 0
    # Whoever scores reads something else.
    eyes.look_ahead("scoring", [], 5)
    eyes.rest("scoring")
    for picture in conversation.pictures:
        eyes.look(picture)
    assert eyes.looked == 2
    eyes.look_ahead("prefill", [(sight, int(sight.columns[-1]), 5)], 5)
    assert eyes.status.kept == 1
    eyes.rest("prefill")
    assert eyes.nbytes == eyes.awaited_cells == 0


def test_looking_ahead_is_bounded_by_the_tokens_that_are_read_next(seeing: Seeing) -> None:
    eyes, conversation = fresh(seeing), seeing.conversations["two"]
    eyes.fit(10_000)
    sight = eyes.sight(conversation.ids, conversation.pictures)
    assert sight is not None

    def looked(tokens: int, *before: tuple[None, int, int], most: int | None = None) -> tuple[int, bool]:
        ahead = eyes.look_ahead("prefill", [*before, (sight, 0, len(conversation.ids))], tokens, most)
        return ahead.pictures, ahead.complete

    first, length = int(sight.columns[0]), len(conversation.ids)
    assert looked(first) == (0, True)
    assert looked(first + 1, most=0) == (0, False)
    assert looked(first + 1) == (1, True)
    assert looked(length, most=1) == (1, True)
    assert looked(length + 5, (None, 0, 5)) == (0, True)
    eyes.clear()
    # Of each view so many tokens, where any may be read first.
    assert looked(first + 1, (None, 0, 5)) == (0, True)
    assert looked(first + 1, (None, 0, 5), most=1) == (1, True)


def test_with_little_room_the_tower_reads_each_picture_once(seeing: Seeing) -> None:
    conversation = seeing.conversations["one"]
    for cells in (4_000, 300, 150):
        driver = seeing.start(kv_memory=cells * seeing.model.info.kv_bytes_per_token)
        shown = pictures(seeing, 6)
        driver.generate([conversation.ids] * 6, pictures=[(each,) for each in shown], max_tokens=3)
        driver.score([conversation.ids] * 6, pictures=tuple((each,) for each in pictures(seeing, 12)[6:]))
        driver.turn()
        eyes = driver.model.eyes
        assert eyes is not None and eyes.awaited_cells == 0
        assert eyes.looked == 12, cells


@pytest.mark.parametrize("scored", [False, True])
def test_where_rows_are_not_to_wait_the_tower_reads_one_picture_a_turn(seeing: Seeing, scored: bool) -> None:
    driver, conversation, shown = seeing.start(prefer="latency"), seeing.conversations["one"], pictures(seeing, 6)
    row = driver.submit([[1, 2, 3, 4]], max_tokens=400, ignore_eos=True)
    driver.turn(10)
    eyes = driver.model.eyes
    assert eyes is not None
    beside = []
    for picture in shown:
        if scored:
            beside.append(driver.ask_score([conversation.ids], pictures=((picture,),)))
        else:
            beside.append(driver.submit([conversation.ids], pictures=[(picture,)], max_tokens=2))
    for _ in range(200):
        before = eyes.looked
        driver.turn()
        assert eyes.looked - before <= 1
        if eyes.looked == 6:
            break
    assert eyes.looked == 6
    driver.abort(row)
    driver.finish(row)


def test_what_a_token_costs_is_learnt_without_the_tower(seeing: Seeing) -> None:
    """The clock moves only while the tower reads."""
    now = [0.0]
    driver, conversation = seeing.start(clock=lambda: now[0]), seeing.conversations["one"]
    eyes = driver.model.eyes
    assert eyes is not None
    eyes.family = SlowTower(eyes.family, now)
    for picture in pictures(seeing, 4):
        driver.score([conversation.ids], pictures=((picture,),))
    for picture in pictures(seeing, 8)[4:]:
        driver.generate([conversation.ids], pictures=[(picture,)], max_tokens=2)
    assert now[0] == 8.0
    costs = driver.seconds_of_a_token
    assert costs("scoring") == costs("prefill") == 0.0 < costs("pictures")


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
    driver.generate([conversation.ids], pictures=[conversation.pictures], max_tokens=3, n=4)
    driver.turn()
    eyes, idle = driver.model.eyes, driver.batches.idle_cells
    assert eyes is not None and 0 < eyes.cells < idle
    for limit, kept in ((8 * idle, idle), (idle + eyes.cells - 1, 0)):
        driver.set_kv_limit(limit)
        driver.score([conversation.ids], pictures=(conversation.pictures,))
        driver.turn()
        assert driver.batches.idle_cells == kept and eyes.status.kept == 1
