"""The directory of versions: what was written is read back, what is torn is set aside."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.bundle import AdapterBundle
from adapters.errors import AdapterError
from adapters.versions import store as store_module
from adapters.versions.packed import pack, unpack
from adapters.versions.store import NameRecord, StateStore, StoreError, VersionRecord
from tests.support.adapter_files import make

LAYERS = {"model.layers.0.q_proj": (6, 4), "model.layers.0.down_proj": (4, 10)}
BASE = "sha256:" + "b" * 64


def bundle(seed: int) -> AdapterBundle:
    return make(LAYERS, seed, rank=2)


def record(name: str, *bundles: AdapterBundle, live: int | None = 1, last: int | None = None) -> NameRecord:
    versions = tuple(
        VersionRecord(number, one.digest, "adapter", f"step-{number}", number == 2, 1.25)
        for number, one in enumerate(bundles, 1)
    )
    return NameRecord(name, last or len(bundles), live, versions)


def fill(directory: Path, name: str = "p", count: int = 3) -> tuple[str, list[AdapterBundle]]:
    """(instance, bundles) of a directory that holds a name with `count` versions, the first live."""
    bundles = [bundle(seed) for seed in range(count)]
    with StateStore(directory) as store:
        store.adopt(BASE)
        for one in bundles:
            store.put(one)
        store.write(record(name, *bundles))
        return store.instance, bundles


def weights(directory: Path) -> set[str]:
    return {f"sha256:{path.stem}" for path in (directory / "bundles").glob("*.safetensors")}


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    instance, bundles = fill(tmp_path)
    with StateStore(tmp_path) as again:
        again.adopt(BASE)
        assert again.instance == instance
        whole, loaded = again.load("p")
    assert whole == record("p", *bundles)
    for one, other in zip(bundles, loaded, strict=True):
        assert (one.digest, one.spec) == (other.digest, other.spec)
        assert {n: t.array.tobytes() for n, t in one.tensors.items()} == {
            n: t.array.tobytes() for n, t in other.tensors.items()
        }


def test_weights_nobody_has_are_removed(tmp_path: Path) -> None:
    _, bundles = fill(tmp_path)
    with StateStore(tmp_path) as store:
        store.adopt(BASE)
        store.write(record("q", bundles[0]))
        store.write(NameRecord("p", 3, None))
        assert len(weights(tmp_path)) == 3, "until the engine has let them go too"
        store.sweep()
        assert weights(tmp_path) == {bundles[0].digest}, "another name still has the first"
        store.put(bundle(8))
        store.forget(bundles[0].digest, bundle(8).digest)
        assert weights(tmp_path) == {bundles[0].digest}
        store.put(bundle(9))  # never acknowledged
    with StateStore(tmp_path) as again:
        again.adopt(BASE)
        assert weights(tmp_path) == {bundles[0].digest}
        assert again.records["p"] == NameRecord("p", 3, None), "the numbering of a deleted name goes on"


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"x" * 5000)])
def test_a_file_that_is_there_is_believed_only_for_its_content(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    _, bundles = fill(tmp_path)
    damage(tmp_path / "bundles" / f"{bundles[0].digest.removeprefix('sha256:')}.safetensors")
    with StateStore(tmp_path) as store:
        store.adopt(BASE)
        store.put(bundles[0])
        assert len(store.load("p")[1]) == 3


def test_new_directories_are_synced_into_their_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(store_module, "_sync_directory", synced.append)
    StateStore(tmp_path / "a" / "b").close()
    assert synced[:2] == [tmp_path, tmp_path / "a"] and synced.count(tmp_path / "a" / "b") == 2


def test_names_that_differ_in_case_have_files_of_their_own(tmp_path: Path) -> None:
    with StateStore(tmp_path) as store:
        store.adopt(BASE)
        for name in ("policy", "Policy", "a.b", "x" * 64):
            store.write(NameRecord(name, 1, None))
        assert len({path.name.lower() for path in (tmp_path / "policies").iterdir()}) == 4
    with StateStore(tmp_path) as again:
        assert set(again.records) == {"policy", "Policy", "a.b", "x" * 64}


def test_one_server_at_a_time(tmp_path: Path) -> None:
    with StateStore(tmp_path), pytest.raises(StoreError, match="in use by another server"):
        StateStore(tmp_path)
    StateStore(tmp_path).close()
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(StoreError, match="cannot be used"):
        StateStore(file)


def test_versions_of_another_base_are_refused(tmp_path: Path) -> None:
    fill(tmp_path)
    other = "sha256:" + "c" * 64
    for _ in range(2):
        with StateStore(tmp_path) as store, pytest.raises(StoreError, match=f"made for the base {BASE}"):
            store.adopt(other)
    (tmp_path / "state.json").unlink()
    with StateStore(tmp_path) as store, pytest.raises(StoreError, match="made for the base"):
        store.adopt(other)


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def nonsense(path: Path) -> None:
    path.write_bytes(json.dumps({"state": [1]}).encode())


DAMAGES = [torn, flipped, emptied, nonsense]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_set_aside_and_never_served(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    _, bundles = fill(tmp_path)
    path = tmp_path / "bundles" / f"{bundles[0].digest.removeprefix('sha256:')}.safetensors"
    damage(path)
    with caplog.at_level(logging.ERROR), StateStore(tmp_path) as store:
        store.adopt(BASE)
        whole, loaded = store.load("p")
    assert [one.digest for one in loaded] == [one.digest for one in bundles[1:]]
    assert (whole.live, whole.last) == (None, 3), "an older version is not served in its place"
    assert not path.exists() and path.with_name(path.name + ".set-aside").exists()
    assert "torn or corrupted" in caplog.text and "p@1 is lost. It was live" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.ERROR), StateStore(tmp_path) as again:
        assert again.load("p")[0] == whole
    assert not caplog.text, "it is said once"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_name_is_set_aside_and_numbers_are_of_a_new_instance(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    instance, _ = fill(tmp_path)
    with StateStore(tmp_path) as store:
        store.adopt(BASE)
        store.write(NameRecord("q", 5, None))
    (path,) = (tmp_path / "policies").glob("p-*.json")
    damage(path)
    with caplog.at_level(logging.ERROR), StateStore(tmp_path) as store:
        assert set(store.records) == {"q"}
        assert store.instance != instance, "p@1 may come again and be something else"
        store.adopt(BASE)
        fresh = store.instance
    assert str(path) in caplog.text and path.with_name(path.name + ".set-aside").exists()
    with StateStore(tmp_path) as again:
        assert again.instance == fresh


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_file_loses_the_instance_alone(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    instance, bundles = fill(tmp_path)
    damage(tmp_path / "state.json")
    with StateStore(tmp_path) as store:
        store.adopt(BASE)
        assert store.instance != instance
        assert store.load("p")[0] == record("p", *bundles)


def test_a_record_under_another_name_is_set_aside(tmp_path: Path) -> None:
    fill(tmp_path)
    (path,) = (tmp_path / "policies").glob("p-*.json")
    path.rename(path.with_name("q-000000000000.json"))
    with StateStore(tmp_path) as store:
        assert not store.records


@pytest.mark.parametrize("step", ["write", "replace", "sync"])
def test_a_failed_write_leaves_what_was_there(tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, bundles = fill(tmp_path)
    before = record("p", *bundles)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with StateStore(tmp_path) as store:
        store.adopt(BASE)
        with monkeypatch.context() as patch:
            if step == "sync":
                patch.setattr(store_module, "_sync", full)
            else:
                patch.setattr(Path, "replace" if step == "replace" else "open", full)
            with pytest.raises(OSError, match="No space"):
                store.put(bundle(7))
            with pytest.raises(OSError, match="No space"):
                store.write(NameRecord("p", 4, None))
        assert store.records["p"] == before
    with StateStore(tmp_path) as again:
        again.adopt(BASE)
        assert again.load("p")[0] == before and weights(tmp_path) == {one.digest for one in bundles}
    assert not list(tmp_path.rglob("*.part"))


def test_weights_that_a_write_in_doubt_may_name_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that was renamed into place and could not be synced is what a restart reads: its weights are there."""
    _, bundles = fill(tmp_path)
    before, after = record("p", *bundles), record("p", *bundles[1:], bundle(7), live=3)
    real = store_module._sync_directory

    def failing(folder: Path) -> None:
        real(folder)
        if folder.name == "policies":
            raise OSError(5, "Input/output error")

    with StateStore(tmp_path) as store:
        store.adopt(BASE)
        store.put(bundle(7))
        with monkeypatch.context() as patch:
            patch.setattr(store_module, "_sync_directory", failing)
            with pytest.raises(OSError, match="Input/output"):
                store.write(after)
        store.forget(bundle(7).digest)
        assert store.records["p"] == before and not store.says(before)
        shutil.copytree(tmp_path, tmp_path / "copy")
        store.write(before)
        store.sweep()
        assert weights(tmp_path) == {one.digest for one in bundles}, "the doubt is over"
    with StateStore(tmp_path / "copy") as again:
        again.adopt(BASE)
        assert again.load("p")[0] == after


@pytest.mark.parametrize(
    "body", [b"", b"{}", pack(bundle(1))[:-3], pack(bundle(1)).replace(b"lora_A", b"lora_X"), b"\0" * 100]
)
def test_what_is_no_packed_bundle_raises_by_name(body: bytes) -> None:
    with pytest.raises((AdapterError, KeyError, ValueError)):
        unpack(body)
