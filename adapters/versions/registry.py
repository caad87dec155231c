"""Names, versions, aliases, reference counts and retention, in plain Python.

A version is immutable and numbered from 1 within its name; the alias of a name is the number that is live. Kept are
the newest `keep_versions` of each name and, beyond these, whatever is live, pinned or in use by rows; the rest is freed
at once, and the caller is told the content of each freed version, to give its memory back. A deleted version is gone
for whoever asks at once, and freed when the last row that uses it ends. Not thread-safe: the engine owns the only one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from adapters.bundle import Content
from adapters.errors import GoneVersion, LiveVersion, Mismatch, UnknownName, UnknownVersion
from adapters.spec import HeadTask, Mode
from adapters.versions.retention import GONE_TOLD, remember, surplus


@dataclass(frozen=True, slots=True)
class Facts:
    """What is worth telling about a version; the registry itself reads only `mode`."""

    kind: str
    mode: Mode
    rank: int
    modules: int
    nbytes: int
    task: HeadTask | None = None
    """What its own head scores; None where it has none."""
    labels: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """One version, as it was when asked for."""

    name: str
    number: int
    digest: str
    label: str | None
    facts: Facts
    created: float
    live: bool
    pinned: bool
    in_use: int
    """How many rows use it."""

    @property
    def content(self) -> Content:
        return Content(self.digest, self.facts.mode)


@dataclass(frozen=True, slots=True)
class Change:
    """`entry` is the version after the change; `freed` the content of each version that retention let go."""

    entry: Entry
    unchanged: bool = False
    """The publish met a version that is already there."""
    freed: tuple[Content, ...] = ()


@dataclass(frozen=True, slots=True)
class Deletion:
    """What was deleted, as it was before."""

    entries: tuple[Entry, ...]
    freed: tuple[Content, ...]
    """The content of each of them that no row uses; the others follow when their last row ends."""


@dataclass(slots=True)
class _Version:
    number: int
    digest: str
    facts: Facts
    created: float
    label: str | None = None
    pinned: bool = False
    in_use: int = 0
    provisional: bool = False

    @property
    def content(self) -> Content:
        return Content(self.digest, self.facts.mode)


@dataclass(slots=True)
class _Line:
    """All that is known of one name. `kept` is in order of number. A name without kept versions was deleted: only its
    numbering goes on."""

    name: str
    last: int = 0
    live: int | None = None
    kept: dict[int, _Version] = field(default_factory=dict)
    leaving: dict[int, _Version] = field(default_factory=dict)
    """Deleted, but still in use by rows."""
    gone: dict[str, None] = field(default_factory=dict)

    def entry(self, version: _Version) -> Entry:
        return Entry(
            name=self.name,
            number=version.number,
            digest=version.digest,
            label=version.label,
            facts=version.facts,
            created=version.created,
            live=version.number == self.live,
            pinned=version.pinned,
            in_use=version.in_use,
        )

    def current(self) -> _Version | None:
        return None if self.live is None else self.kept[self.live]

    def find(self, number: int) -> _Version:
        version = self.kept.get(number)
        if version is None and 1 <= number <= self.last:
            raise GoneVersion(f"{self.name}@{number} was freed: it was deleted, or too old to be kept without a pin.")
        if version is None:
            raise UnknownVersion(f"{self.name} has no version {number}; its newest is {self.last}.")
        return version

    def find_digest(self, prefix: str) -> _Version:
        for version in reversed(self.kept.values()):
            if version.digest.startswith(prefix):
                return version
        if any(digest.startswith(prefix) for digest in self.gone):
            raise GoneVersion(f"{self.name}@{prefix} was freed: it was deleted, or too old to be kept without a pin.")
        raise UnknownVersion(f"{self.name} has no version with digest {prefix}.")

    def used(self, number: int) -> _Version:
        """A version that rows may hold, deleted or not."""
        return self.leaving.get(number) or self.find(number)


class Registry:
    """`keep_versions` is how many of the newest versions of each name are kept in any case, at least 1; None where
    every version is kept until it is deleted, because somebody else decides on it."""

    def __init__(self, keep_versions: int | None) -> None:
        if keep_versions is not None and keep_versions < 1:
            raise ValueError(f"keep_versions must be at least 1, not {keep_versions}.")
        self._keep = keep_versions
        self._lines: dict[str, _Line] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Those with kept versions."""
        return tuple(sorted(name for name, line in self._lines.items() if line.kept))

    @property
    def nbytes(self) -> int:
        """Bytes of all versions, deleted ones that rows still use included."""
        lines = self._lines.values()
        return sum(v.facts.nbytes for line in lines for held in (line.kept, line.leaving) for v in held.values())

    def last(self, name: str) -> int:
        """The newest number that a name ever had; 0 for one that was never published."""
        line = self._lines.get(name)
        return line.last if line else 0

    def gone(self, name: str) -> tuple[str, ...]:
        """The newest `GONE_TOLD` digests of freed versions of a name, oldest first."""
        line = self._lines.get(name)
        return tuple(islice(reversed(line.gone), GONE_TOLD))[::-1] if line else ()

    def versions(self, name: str) -> tuple[Entry, ...]:
        """Kept versions, oldest first. Raises `UnknownName`."""
        line = self._kept_line(name)
        return tuple(line.entry(version) for version in line.kept.values())

    def live(self, name: str) -> Entry | None:
        """Where the alias points, if anywhere. Raises `UnknownName`."""
        line = self._kept_line(name)
        current = line.current()
        return None if current is None else line.entry(current)

    def resolve(self, name: str, number: int | None = None, digest: str | None = None) -> Entry:
        """The version that `NAME`, `NAME@number` or `NAME@digest` means; `digest` is `sha256:` and a prefix of the
        hex digits, and where several versions share it the newest is meant.

        Raises `UnknownName`, `UnknownVersion` or `GoneVersion`."""
        line = self._line(name)
        if number is not None:
            return line.entry(line.find(number))
        if digest is not None:
            return line.entry(line.find_digest(digest))
        current = self._kept_line(name).current()
        if current is None:
            raise UnknownVersion(f"No version of {name} is live: activate one, or ask for {name}@{line.last}.")
        return line.entry(current)

    def same(self, name: str, digest: str, mode: str) -> Entry | None:
        """The version that publishing this content would leave as it is: the live or else the newest one of `name`,
        if it has this digest and mode. None means that a publish makes a new version."""
        line = self._lines.get(name)
        version = _same(line, digest, mode) if line else None
        return line.entry(version) if line and version else None

    def numbered(self, name: str, number: int) -> Entry | None:
        """The kept version of this number, if there is one."""
        line = self._lines.get(name)
        version = line.kept.get(number) if line else None
        return line.entry(version) if line and version else None

    def require(self, name: str, if_match: str | None) -> None:
        """Raises `Mismatch` unless the alias is at `if_match`: a number, or `sha256:` and at least 8 hex digits."""
        if if_match is None:
            return
        line = self._lines.get(name)
        current = line.current() if line else None
        number = re.fullmatch(r"[0-9]{1,12}", if_match)
        if not number and not re.fullmatch(r"sha256:[0-9a-f]{8,64}", if_match):
            raise Mismatch(f"If-Match names a version by number or by sha256:…, and not as {if_match[:80]!r}.")
        if current is None:
            raise Mismatch(f"If-Match asks for {if_match}, but no version of {name} is live.")
        if current.number != int(if_match) if number else not current.digest.startswith(if_match):
            raise Mismatch(
                f"If-Match asks for {if_match}, but {name} is at version {current.number} ({current.digest}).",
                at=(current.number, current.digest),
            )

    def publish(
        self,
        name: str,
        digest: str,
        facts: Facts,
        *,
        created: float,
        activate: bool = True,
        label: str | None = None,
        if_match: str | None = None,
        provisional: bool = False,
        number: int | None = None,
    ) -> Change:
        """Make the next version of `name`, and with `activate` move the alias to it. A `provisional` one is only made:
        no alias moves, no label changes, nothing is freed; published again it is `unchanged`, and the rest is done.

        Content equal to the live or the newest version makes none: that version is the answer, `unchanged`, with the
        label replaced if one is given. This is decided before `if_match`, so that repeating a publish is safe. With a
        `number` the kept version of that number is the answer, and otherwise one of that number is made.
        Raises `Mismatch`; nothing has changed then."""
        line = self._lines.get(name)
        if number is not None:
            version = _numbered(line, number, digest) if line else None
        else:
            version = _same(line, digest, facts.mode) if line else None
        unchanged = version is not None
        if version is None:
            self.require(name, if_match)
            line = self._lines.setdefault(name, _Line(name))
            number = number or line.last + 1
            line.last = max(line.last, number)
            version = line.kept[number] = _Version(number, digest, facts, created)
            line.kept = dict(sorted(line.kept.items()))
            line.gone.pop(digest, None)
        line = self._lines[name]
        if provisional:
            if not unchanged:
                version.label, version.provisional = label, True
            return Change(line.entry(version), unchanged=unchanged)
        version.provisional = False
        if label is not None:
            version.label = label
        if activate:
            line.live = version.number
        freed = self._retain(line)
        return Change(line.entry(version), unchanged=unchanged, freed=freed)

    def activate(self, name: str, number: int, if_match: str | None = None) -> Change:
        """Move the alias to a kept version. Raises `UnknownName`, `UnknownVersion`, `GoneVersion` or `Mismatch`."""
        line = self._line(name)
        version = line.find(number)
        self.require(name, if_match)
        unchanged = line.live == number
        line.live = number
        freed = self._retain(line)
        return Change(line.entry(version), unchanged=unchanged, freed=freed)

    def pin(self, name: str, number: int, pinned: bool) -> Change:
        """Keep a version whatever its age, or no longer. Raises `UnknownName`, `UnknownVersion` or `GoneVersion`.

        Unpinning may free the version itself: then it is in `freed`, and `entry` is how it was left."""
        line = self._line(name)
        version = line.find(number)
        unchanged = version.pinned == pinned
        version.pinned = pinned
        entry = line.entry(version)
        return Change(entry, unchanged=unchanged, freed=self._retain(line))

    def delete(self, name: str, number: int) -> Deletion:
        """Let a version go, pinned or not. Raises `UnknownName`, `UnknownVersion`, `GoneVersion` or `LiveVersion`."""
        line = self._line(name)
        version = line.find(number)
        if line.live == number:
            raise LiveVersion(f"{name}@{number} is live: activate another version first, or delete {name} as a whole.")
        return self._delete(line, [version])

    def delete_name(self, name: str) -> Deletion:
        """Let all versions of a name go, the live one too. Raises `UnknownName`."""
        line = self._kept_line(name)
        line.live = None
        return self._delete(line, list(line.kept.values()))

    def restore(self, name: str, last: int, entries: Sequence[Entry], gone: Iterable[str] = ()) -> tuple[Content, ...]:
        """Put back a name that is not known here: its numbering, its versions and its alias, as `entries` say, oldest
        first, and the digests of freed versions. Returns the contents of those that retention frees at once."""
        if name in self._lines or any(not 1 <= entry.number <= last for entry in entries):
            raise ValueError(f"{name} is known already, or has versions beyond its last, {last}.")
        line = self._lines[name] = _Line(name, last, gone=dict.fromkeys(gone))
        for entry in entries:
            line.kept[entry.number] = _Version(
                entry.number, entry.digest, entry.facts, entry.created, entry.label, entry.pinned
            )
            line.live = entry.number if entry.live else line.live
        return self._retain(line)

    def acquire(self, name: str, number: int, rows: int = 1) -> None:
        """`rows` more rows use a version that is kept, or deleted but still held by others. Raises `UnknownName`,
        `UnknownVersion` or `GoneVersion`."""
        if rows < 1:
            raise ValueError(f"At least one row acquires a version, not {rows}.")
        self._line(name).used(number).in_use += rows

    def release(self, name: str, number: int, rows: int = 1) -> tuple[Content, ...]:
        """`rows` rows less use the version; returns the contents freed by that. Raises `ValueError` where fewer rows
        hold it: that is a fault of the caller, and nothing has changed."""
        line = self._lines.get(name)
        version = (line.kept.get(number) or line.leaving.get(number)) if line else None
        if line is None or version is None or not 1 <= rows <= version.in_use:
            raise ValueError(f"{rows} rows release {name}@{number}, which fewer rows hold.")
        version.in_use -= rows
        if version.in_use:
            return ()
        if line.leaving.pop(number, None) is not None:
            return (version.content,)
        return self._retain(line)

    def _line(self, name: str) -> _Line:
        line = self._lines.get(name)
        if line is None:
            raise UnknownName(f"There is no policy {name[:80]!r}; push weights under this name first.")
        return line

    def _kept_line(self, name: str) -> _Line:
        line = self._line(name)
        if not line.kept:
            raise UnknownName(f"The policy {name} was deleted; push weights under this name again.")
        return line

    def _delete(self, line: _Line, versions: list[_Version]) -> Deletion:
        entries = tuple(line.entry(version) for version in versions)
        self._forget(line, versions)
        line.leaving |= {version.number: version for version in versions if version.in_use}
        return Deletion(entries, tuple(version.content for version in versions if not version.in_use))

    def _retain(self, line: _Line) -> tuple[Content, ...]:
        if freed := list(self._surplus(line)):
            self._forget(line, freed)
        return tuple(version.content for version in freed)

    @staticmethod
    def _forget(line: _Line, versions: list[_Version]) -> None:
        for version in versions:
            del line.kept[version.number]
        remember(line.gone, [version.digest for version in versions])

    def _surplus(self, line: _Line) -> Iterator[_Version]:
        """Versions that nothing keeps, oldest first. One that may still be taken back pushes out no other."""
        if self._keep is None or len(line.kept) <= self._keep:
            return
        settled = {version.number: version for version in line.kept.values() if not version.provisional}
        held = [version.number for version in settled.values() if version.pinned or version.in_use]
        yield from (settled[number] for number in surplus(list(settled), self._keep, line.live, held))


def _same(line: _Line, digest: str, mode: str) -> _Version | None:
    """The live version comes first, so that equal content never moves the alias."""
    newest = line.kept.get(line.last)
    candidates = (line.current(), newest)
    return next((v for v in candidates if v and v.digest == digest and v.facts.mode == mode), None)


def _numbered(line: _Line, number: int, digest: str) -> _Version | None:
    version = line.kept.get(number)
    if version is not None and version.digest != digest:
        raise ValueError(f"{line.name}@{number} is {version.digest} here, and not {digest}.")
    return version
