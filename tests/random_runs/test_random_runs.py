"""Nothing that a trainer may do, in whatever order, breaks what is promised of versions and rows."""

from __future__ import annotations

import pytest

from adapters.bundle import Content
from adapters.prepare import PreparedBundle
from adapters.resident import residency as resident_module
from adapters.resident.parameter_sets import ParameterSets
from adapters.versions.registry import Registry
from rollout_server.versions.publisher import Publisher
from tests.laws.grids import some_long
from tests.random_runs.bases import World
from tests.random_runs.play import Player, explore, failure, invent, shortest


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.make(tmp_path_factory.mktemp("sequences") / "tiny")


@pytest.mark.parametrize("sequences", some_long([6, 10], 6))
def test_random_sequences_keep_every_promise(world: World, sequences: int) -> None:
    """The same ones in every run; `python -m tests.random_runs.play --sequences N --seed K` plays others."""
    checked = explore(world, range(sequences))
    assert checked["operations"] >= 30 * sequences and checked["tokens"] >= 100 * sequences, checked
    assert checked["directories"] and checked["told StorageFailed"] and checked["Restored"], checked


@pytest.mark.long
def test_a_broken_promise_is_found_and_made_short(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks can fail: a reference that is not given back when a row switches."""
    from rollout_server.engine.scheduling.on_update import VersionSwitcher

    follow = VersionSwitcher.follow

    def leaking(self: VersionSwitcher, row: object) -> None:
        before = row.version  # type: ignore[attr-defined]
        follow(self, row)  # type: ignore[arg-type]
        if row.version != before:  # type: ignore[attr-defined]
            self._policies.acquire_again(row.version, 1)  # type: ignore[attr-defined]

    monkeypatch.setattr(VersionSwitcher, "follow", leaking)
    seed = next(seed for seed in range(40) if failure(world, invent(seed)))
    short = shortest(world, invent(seed))
    assert "counted" in (failure(world, short) or "") and len(short) <= 6
    monkeypatch.undo()
    Player(world).play(short)


def keyed_by_digest(prepared: PreparedBundle) -> Content:
    return Content(prepared.bundle.digest, "adapter")


def left_mounted(self: ParameterSets, number: int) -> None:
    self._sets.pop(number, None)


async def never(*_: object) -> None:
    return None


@pytest.mark.parametrize(
    ("place", "name", "wrong", "first"),
    [
        (resident_module, "_content", keyed_by_digest, 0),
        (ParameterSets, "drop", left_mounted, 1),
        (Publisher, "_settle", never, 3),
        (Registry, "require", lambda *_: None, 9),
    ],
    ids=["modes are mixed up", "a set stays mounted", "the directory keeps what is freed", "conditions are not read"],
)
def test_planted_faults_are_found(
    place: object, name: str, wrong: object, first: int, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`first` is a seed that finds it, so that few are played."""
    monkeypatch.setattr(place, name, wrong)
    assert any(failure(world, invent(seed), bool(seed % 2)) for seed in range(first, 20))
