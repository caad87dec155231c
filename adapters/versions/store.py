"""A crash-safe directory of versions: what was acknowledged is on disk, and what is torn is never served.

    lock                      held by the one server that uses the directory; its bytes are a reserve for a full disk
    state.json                which base the versions were made for, and the `instance` their numbers belong to
    policies/NAME-….json      one name: its versions, where its alias points, the newest number it ever had
    bundles/HEX.safetensors   the weights of one digest, shared by all versions that have it

Every file is written beside its place, synced, renamed, and its directory synced. JSON carries its own SHA-256, weights
are hashed again when they are read. A file that does not hold what it says is renamed to `….set-aside` with a line in
the log. On a full disk versions can still be let go. Only one thread at a time may use a store; it does blocking I/O.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from adapters.bundle import AdapterBundle
from adapters.errors import AdapterError
from adapters.spec import Mode
from adapters.versions.packed import pack, unpack
from adapters.versions.reserve import Reserve, is_full
from adapters.versions.sealed import FORMAT, sealed, unsealed

log = logging.getLogger("adapters.store")

PART = ".part"
SET_ASIDE = ".set-aside"
UNREADABLE = (OSError, AdapterError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading a file that holds anything at all may raise."""


class StoreError(Exception):
    """The directory cannot be used; `message` says what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


@dataclass(frozen=True, slots=True)
class VersionRecord:
    number: int
    digest: str
    mode: Mode
    label: str | None
    pinned: bool
    created: float


@dataclass(frozen=True, slots=True)
class NameRecord:
    """`versions` are oldest first; a deleted name has none, and goes on numbering after `last`."""

    name: str
    last: int
    live: int | None
    versions: tuple[VersionRecord, ...] = ()
    gone: tuple[str, ...] = ()
    """Digests of versions that were freed, oldest first: they stay known as such."""


class StateStore:
    """`records` is what the directory says of each name. Use it as a context manager, or close it."""

    def __init__(self, directory: Path) -> None:
        """Opens or makes the directory. Raises `StoreError` where another server uses it, or it cannot be used."""
        self._root = directory
        self._bundles = directory / "bundles"
        self._policies = directory / "policies"
        self._state = directory / "state.json"
        self._clean = True
        self._doubtful: dict[str, list[NameRecord]] = {}
        """By name, the writes that failed so late that they may be on disk nevertheless, since the last that did not
        fail."""
        self._dropped: set[str] = set()
        """Digests that some name no longer has; their files may still be there."""
        try:
            for folder in (self._bundles, self._policies):
                make_durably(folder)
            self._lock = (directory / "lock").open("a")
        except OSError as error:
            raise StoreError(f"The state directory {directory} cannot be used: {error}.") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise StoreError(
                f"The state directory {directory} is in use by another server: end that one, or choose another."
            ) from error
        self._reserve = Reserve(self._lock.fileno())
        self._remove_parts()
        self.records: dict[str, NameRecord] = {}
        self._bases: set[str] = set()
        self._read_records()
        self.instance = self._read_instance()

    def __enter__(self) -> StateStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._lock.close()

    # ---- at the start -----------------------------------------------------------------------------------------------

    def adopt(self, base: str) -> None:
        """The versions here are for the base with this digest. Raises `StoreError` where they are for another one."""
        foreign = self._bases - {base}
        if foreign:
            raise StoreError(
                f"The state directory {self._root} holds versions made for the base {', '.join(sorted(foreign))}, and "
                f"this base is {base}: serve that one, or choose another directory."
            )
        self._bases = {base}
        body = sealed({"format": FORMAT, "instance": self.instance, "base": base})
        try:
            # A full disk keeps nobody from starting and making room.
            if not _holds(self._state, body):
                write_durably(self._state, body)
            self._refill()
        except OSError as error:
            raise StoreError(f"The state directory {self._root} cannot be written: {error}.") from error
        self.forget(*(f"sha256:{path.stem}" for path in self._bundles.glob("*.safetensors")))

    def load(self, name: str) -> tuple[NameRecord, tuple[AdapterBundle, ...]]:
        """A name with the bundle of each of its versions. Those whose weights are missing or do not have their digest
        are set aside, left out of the record, and the alias points nowhere if it was at one of them."""
        record = self.records[name]
        kept: list[tuple[VersionRecord, AdapterBundle]] = []
        read: dict[str, AdapterBundle | None] = {}
        for version in record.versions:
            if version.digest not in read:
                read[version.digest] = self._read_bundle(version.digest)
            bundle = read[version.digest]
            if bundle is None:
                live = " It was live: the name serves nothing until another version is activated."
                log.error("%s@%d is lost.%s", name, version.number, live if version.number == record.live else "")
            else:
                kept.append((version, bundle))
        versions = tuple(version for version, _ in kept)
        numbers = {version.number for version in versions}
        whole = replace(record, versions=versions, live=record.live if record.live in numbers else None)
        if whole != record:
            try:
                self.write_in_reserve(whole)
            except OSError as error:
                log.warning("The state directory could not be written, and says that they are there: %s", error)
            self.sweep()
        return whole, tuple(bundle for _, bundle in kept)

    # ---- while serving ----------------------------------------------------------------------------------------------

    def put(self, bundle: AdapterBundle) -> None:
        """The weights are on disk when this returns. Raises `OSError`."""
        path, body = self._bundle_path(bundle.digest), pack(bundle)
        # A file that is there may have been torn or changed since it was written.
        if not _holds(path, body):
            write_durably(path, body)

    def write(self, record: NameRecord) -> None:
        """The name is on disk as `record` says when this returns. The files of its weights must be there already;
        those that it no longer has stay until `sweep`. Raises `OSError`, and the directory says what it said before."""
        if self.says(record):
            return
        before = self.records.get(record.name)
        (base,) = self._bases
        body = {"format": FORMAT, "base": base, **asdict(record)}
        path = self._record_path(record.name)
        part = _write_part(path, sealed(body))
        doubtful = self._doubtful.setdefault(record.name, [])
        doubtful.append(record)
        _put_in_place(part, path)
        del self._doubtful[record.name]
        self.records[record.name] = record
        self._dropped |= _digests([*doubtful, *([before] if before else [])])

    def write_in_reserve(self, record: NameRecord) -> None:
        """`write` for a change that needs no more room than there was: on a full disk the reserve is given up for it,
        and if that is not enough, the weights that only `record` lets go are removed before it. Raises `OSError`."""
        try:
            if not self._written(record) and not (self._reserve.give() and self._written(record)):
                self._let_go(record)
                self.write(record)
        finally:
            self._refill()

    def _written(self, record: NameRecord) -> bool:
        """Returns whether there was room for it."""
        try:
            self.write(record)
        except OSError as error:
            if not is_full(error):
                raise
            return False
        return True

    def _let_go(self, record: NameRecord) -> None:
        others = [other for other in self.records.values() if other.name != record.name]
        doubtful = [other for records in self._doubtful.values() for other in records]
        before = self.records.get(record.name)
        for digest in (_digests([before]) if before else set()) - _digests([*others, *doubtful, record]):
            log.warning(
                "The disk is full: %s, which %s lets go, is removed before that is written.", digest, record.name
            )
            self._remove(digest)

    def _refill(self) -> None:
        """The reserve is enough for the largest file of a name."""
        try:
            self._reserve.fill(max((path.stat().st_size for path in self._policies.glob("*.json")), default=0))
        except OSError as error:
            log.warning("There is no reserve in the state directory: %s", error)

    def says(self, record: NameRecord) -> bool:
        """Returns whether this is on disk for certain, so that there is nothing to write."""
        return self.records.get(record.name) == record and not self.doubts(record.name)

    def doubts(self, name: str) -> bool:
        """Returns whether the file of a name may say something else than `records`, after a write that failed late."""
        return name in self._doubtful

    def sweep(self) -> None:
        """Removes the weights that names no longer have."""
        self.forget(*self._dropped)

    def forget(self, *digests: str) -> None:
        """Removes weights that no name has, nor may have on disk after a write that failed. A file that cannot be
        removed takes room and changes nothing: it is a line in the log, and tried again at the next start."""
        self._dropped -= set(digests)
        for digest in set(digests) - self._referenced():
            self._remove(digest)

    def _remove(self, digest: str) -> None:
        path = self._bundle_path(digest)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s, which no version needs, could not be removed: %s", path, error)

    # ---- files ------------------------------------------------------------------------------------------------------

    def _referenced(self) -> set[str]:
        doubtful = [record for records in self._doubtful.values() for record in records]
        return _digests([*self.records.values(), *doubtful])

    def _bundle_path(self, digest: str) -> Path:
        return self._bundles / f"{digest.removeprefix('sha256:')}.safetensors"

    def _record_path(self, name: str) -> Path:
        # Some file systems do not tell `Policy` from `policy`.
        return self._policies / f"{name}-{hashlib.sha256(name.encode()).hexdigest()[:12]}.json"

    def _remove_parts(self) -> None:
        for folder in (self._root, self._bundles, self._policies):
            for path in folder.glob(f"*{PART}"):
                log.info("%s was never finished, and so never acknowledged: it is removed.", path)
                path.unlink()

    def _read_records(self) -> None:
        for path in sorted(self._policies.glob("*.json")):
            try:
                body = unsealed(path.read_bytes())
                record = _record(body)
                base = str(body["base"])
                if path != self._record_path(record.name):
                    raise ValueError(f"it speaks of {record.name}")
            except UNREADABLE as error:
                self._set_aside(path, error)
                continue
            self.records[record.name] = record
            self._bases.add(base)

    def _read_instance(self) -> str:
        """Where a name was lost its numbers begin anew, so they are of another instance."""
        instance = secrets.token_hex(8)
        if not self._state.exists():
            return instance
        try:
            body = unsealed(self._state.read_bytes())
            known = str(body["instance"])
            self._bases.add(str(body["base"]))
        except UNREADABLE as error:
            self._set_aside(self._state, error)
            return instance
        return known if self._clean else instance

    def _read_bundle(self, digest: str) -> AdapterBundle | None:
        path = self._bundle_path(digest)
        try:
            bundle = unpack(path.read_bytes())
            if bundle.digest != digest:
                raise ValueError(f"it holds {bundle.digest}")
        except FileNotFoundError:
            log.error("%s is not there.", path)
            return None
        except UNREADABLE as error:
            self._set_aside(path, error)
            return None
        return bundle

    def _set_aside(self, path: Path, error: Exception) -> None:
        self._clean = False
        aside = next(place for place in _places(path) if not place.exists())
        path.rename(aside)
        log.error("%s is torn or corrupted (%s): it is not served, and was renamed to %s.", path, error, aside.name)


# ---- what the files hold --------------------------------------------------------------------------------------------


def _digests(records: Iterable[NameRecord]) -> set[str]:
    return {version.digest for record in records for version in record.versions}


def _record(body: Mapping[str, Any]) -> NameRecord:
    versions = tuple(VersionRecord(**version) for version in body["versions"])
    if any(version.mode not in ("adapter", "merged") for version in versions):
        raise ValueError("it has a mode that is not known")
    return NameRecord(
        str(body["name"]), int(body["last"]), body["live"], versions, tuple(map(str, body.get("gone", ())))
    )


def _places(path: Path) -> Iterator[Path]:
    yield path.with_name(path.name + SET_ASIDE)
    for number in range(1, 10**6):
        yield path.with_name(f"{path.name}{SET_ASIDE}-{number}")


def write_durably(path: Path, body: bytes) -> None:
    """`path` holds `body` when this returns, and all of it or what it held before if the machine stops meanwhile."""
    _put_in_place(_write_part(path, body), path)


def _write_part(path: Path, body: bytes) -> Path:
    """A synced file beside `path`, which is as it was."""
    part = path.with_name(path.name + PART)
    try:
        with part.open("wb") as file:
            file.write(body)
            file.flush()
            _sync(file.fileno())
    except OSError:
        # What was written of it takes the room that others need.
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    return part


def _put_in_place(part: Path, path: Path) -> None:
    part.replace(path)
    _sync_directory(path.parent)


def make_durably(folder: Path) -> None:
    """The folder is there when this returns, and still is if the machine stops. Raises `OSError`."""
    if folder.is_dir():
        return
    make_durably(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_directory(folder.parent)


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _holds(path: Path, body: bytes) -> bool:
    try:
        return path.stat().st_size == len(body) and path.read_bytes() == body
    except OSError:
        return False


def _sync(descriptor: int) -> None:
    # On macOS fsync leaves the bytes in the drive's own cache.
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is None:
        os.fsync(descriptor)
    else:
        fcntl.fcntl(descriptor, full)
