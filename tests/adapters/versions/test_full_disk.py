"""On a full disk versions can still be let go, unpinned and activated, and a server starts."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from adapters.versions import reserve as reserve_module
from adapters.versions import store as store_module
from adapters.versions.store import NameRecord, StateStore
from tests.adapters.versions.test_store import BASE, bundle, record


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Says how many blocks of 4096 bytes the disk under `tmp_path` has. Files that are cut short or removed give theirs
    back, as on a real one; what a file replaces is there until it is replaced."""
    blocks = [10**9]
    real_write, real_part = os.write, store_module._write_part

    def free() -> int:
        used = sum(-(-path.stat().st_size // 4096) for path in tmp_path.rglob("*") if path.is_file())
        return blocks[0] - used

    def write_part(path: Path, body: bytes) -> Path:
        if -(-len(body) // 4096) > free():
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_part(path, body)

    def write(descriptor: int, data: bytes) -> int:
        if free() <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_write(descriptor, data[: free() * 4096])

    monkeypatch.setattr(store_module, "_write_part", write_part)
    # The module's own `os`: whatever else writes in this process has the real disk.
    monkeypatch.setattr(reserve_module, "os", SimpleNamespace(**vars(os) | {"write": write}))

    def have(count: int | None = None) -> None:
        blocks[0] = blocks[0] - free() if count is None else count

    return have


def shared_by_two(store: StateStore) -> tuple[NameRecord, NameRecord]:
    """Two names whose only version has the same weights."""
    weights = bundle(1)
    store.put(weights)
    pair = record("p", weights), record("q", weights)
    for each in pair:
        store.write(each)
    return pair


def without(name: NameRecord) -> NameRecord:
    return replace(name, versions=(), live=None, gone=tuple(v.digest for v in name.versions))


def test_on_a_full_disk_a_record_takes_the_reserve(tmp_path: Path, small_disk: Callable[..., None]) -> None:
    with StateStore(tmp_path) as store:
        store.adopt(BASE)
        p, q = shared_by_two(store)
        store.write_in_reserve(replace(p, versions=(replace(p.versions[0], label="kept"),)))
        small_disk()
        for change in (replace(p, versions=(replace(p.versions[0], pinned=True),)), p, without(p), without(q)):
            with pytest.raises(OSError, match="No space"):
                store.write(change)
            # Weights that another name has cannot make room.
            store.write_in_reserve(change)
            assert store.says(change)
        store.sweep()
        assert not list(tmp_path.glob("bundles/*"))
    with StateStore(tmp_path) as store:
        store.adopt(BASE)
        assert store.records == {"p": without(p), "q": without(q)}


def test_without_a_reserve_weights_that_nobody_will_have_go_first(
    tmp_path: Path, small_disk: Callable[..., None]
) -> None:
    with StateStore(tmp_path) as store:
        store.adopt(BASE)
        first, second = bundle(1), bundle(2)
        for each in (first, second):
            store.put(each)
        both = record("p", first, second, live=2)
        store.write(both)
        (tmp_path / "lock").write_bytes(b"")
        small_disk()
        with pytest.raises(OSError, match="No space"):
            store.write_in_reserve(replace(both, live=1))
        assert store.says(both) and len(list(tmp_path.glob("bundles/*"))) == 2, "nothing is let go here"
        one = replace(both, versions=both.versions[1:])
        store.write_in_reserve(one)
        assert store.says(one) and [path.stem for path in tmp_path.glob("bundles/*")] == [second.digest[7:]]
        assert (tmp_path / "lock").stat().st_size > 0, "and there is a reserve again"


def test_a_server_starts_on_a_full_disk(tmp_path: Path, small_disk: Callable[..., None]) -> None:
    with StateStore(tmp_path) as store:
        store.adopt(BASE)
        p, q = shared_by_two(store)
    (tmp_path / "lock").write_bytes(b"")
    small_disk()
    with StateStore(tmp_path) as store:
        store.adopt(BASE)
        assert store.load("p")[0] == p and store.load("q")[0] == q


def test_weights_that_did_not_fit_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a large file would take the room that is missing."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with StateStore(tmp_path) as store:
        store.adopt(BASE)
        monkeypatch.setattr(store_module, "_sync", full)
        with pytest.raises(OSError, match="No space"):
            store.put(bundle(1))
        assert not list((tmp_path / "bundles").iterdir())
