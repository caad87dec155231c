"""Seconds of the processor that threads and processes have taken, as Linux counts them: to the nanosecond, so that
windows of seconds tell tenths of a millisecond. How many cores there are, and who else works, changes them little."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

NS = 1e-9


def counted() -> bool:
    """Returns whether this system counts so."""
    return Path("/proc/self/schedstat").exists()


def of_main_thread(pid: int) -> float:
    """What the thread took that a server's event loop runs on: HTTP, the page, metrics; nothing of the engine."""
    return _seconds(Path(f"/proc/{pid}/task/{pid}"))


def of_tree(pid: int) -> float:
    """What a process took, and all below it that live."""
    return sum(_seconds(thread) for process in _tree(pid) for thread in _listed(Path(f"/proc/{process}/task")))


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for thread in _listed(Path(f"/proc/{pid}/task")):
        for child in _read(thread / "children").split():
            yield from _tree(int(child))


def _seconds(thread: Path) -> float:
    """0 of a thread that has ended meanwhile."""
    return NS * int((_read(thread / "schedstat") or "0").split()[0])


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
