"""Prints the part of lock files that a user of the server gets: what it depends on, with the demo's extra, and no tool
that only its tests and checks need. `make sbom` lists it.

    python packaging/shipped.py requirements.lock.txt [requirements.cuda13.lock.txt]

Each entry of a lock says by which packages it is there ("# via"); those that lead to the project itself stay.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ENTRY = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==.*(?:\n[ ].*)*", re.MULTILINE)
ROOTS = re.compile(r"rollout-server \(pyproject\.toml(?::(?P<group>[a-z0-9]+))?\)")
SHIPPED = {None, "cuda13"}
"""What the project itself asks for, and a build of mlx that takes another's place."""


def shipped(*locks: str) -> list[str]:
    """The entries of these locks that ship, by name. What a later lock has takes the place of an earlier one's, with
    what only that one needed."""
    read = [{match["name"]: match[0] for match in ENTRY.finditer(lock)} for lock in locks]
    entries = {name: entry for lock in read for name, entry in lock.items()}
    needed_by = {
        name: {
            parent
            for lock in read
            for parent in _parents(lock.get(name, ""))
            if lock.get(parent) == entries.get(parent)
        }
        for name in entries
    }
    found = {name for name, entry in entries.items() if any(m["group"] in SHIPPED for m in ROOTS.finditer(entry))}
    left = set(found)
    while left:
        left = {name for name, parents in needed_by.items() if name not in found and parents & left}
        found |= left
    return [entries[name] for name in sorted(found)]


def _parents(entry: str) -> list[str]:
    """The packages that a lock's entry names as those that need it."""
    comments = [line.strip()[1:].strip() for line in entry.splitlines() if line.strip().startswith("#")]
    return [line.removeprefix("via").strip() for line in comments if line.removeprefix("via").strip()]


if __name__ == "__main__":
    sys.stdout.writelines(f"{entry}\n" for entry in shipped(*(Path(path).read_text("utf-8") for path in sys.argv[1:])))
