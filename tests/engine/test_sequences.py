"""Nothing that a trainer may do, in whatever order, breaks what is promised of versions and rows."""

from __future__ import annotations

import pytest

from tests.engine.sequences import Player, World, explore, failure, invent, shortest


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.make(tmp_path_factory.mktemp("sequences") / "tiny")


def test_random_sequences_keep_every_promise(world: World) -> None:
    """The same ones in every run; `python -m tests.engine.sequences --sequences N --seed K` plays others."""
    checked = explore(world, range(20))
    assert checked["operations"] >= 600 and checked["tokens"] >= 3000, checked


def test_a_broken_promise_is_found_and_made_short(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks can fail: a reference that is not given back when a row switches."""
    from rollout_server.engine.switching import Switching

    follow = Switching.follow

    def leaking(self: Switching, row: object) -> None:
        before = row.version  # type: ignore[attr-defined]
        follow(self, row)  # type: ignore[arg-type]
        if row.version != before:  # type: ignore[attr-defined]
            self._policies.acquire_again(row.version, 1)  # type: ignore[attr-defined]

    monkeypatch.setattr(Switching, "follow", leaking)
    seed = next(seed for seed in range(40) if failure(world, invent(seed)))
    short = shortest(world, invent(seed))
    assert "counted" in (failure(world, short) or "") and len(short) <= 6
    monkeypatch.undo()
    Player(world).play(short)
