"""How many files this process may have open, of which every connection is one. Standard library only.

mlx-lm sets the limit to (2048, 4096) when it is imported: where less is allowed the import fails, and where more is it
takes the rest away for good, since only root raises a hard limit. So every entry point that comes to import it calls
`import_mlx_lm` before.
"""

from __future__ import annotations

import builtins
import importlib
import resource
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType, SimpleNamespace
from typing import Any

WANTED = 65_536
STEPS = (WANTED, 16_384, 10_240, 4_096, 2_048, 1_024)
"""Limits that are tried in turn: macOS names no hard limit, and refuses more than it has."""
PLENTY = 4_096
"""With so many files nobody needs to be told."""
RESERVE = 64
"""Files that connections may not take, or an eighth of what there is."""
OWN = 10
SETS_THE_LIMIT = "mlx_lm.utils"
ALONE = threading.Lock()
"""Two threads that put their finders into Python's one list at once would undo each other."""


@dataclass(frozen=True, slots=True)
class OpenFiles:
    """The limits as they are now; `None` where there is none."""

    soft: int | None
    hard: int | None

    @classmethod
    def now(cls) -> OpenFiles:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return cls(*(None if limit == resource.RLIM_INFINITY else limit for limit in (soft, hard)))

    @property
    def few(self) -> bool:
        """True if there are so few that the log should say so."""
        return self.soft is not None and self.soft < PLENTY

    @property
    def last(self) -> int | None:
        """The highest file number that a connection may have: those above are for weights, state and models."""
        return None if self.soft is None else self.soft - 1 - min(RESERVE, self.soft // 8)

    @property
    def crowded(self) -> int | None:
        """From this file number on a connection is there to ask after the server's health, and no more."""
        return None if self.soft is None or self.last is None else self.last + 1 - min(16, max(1, self.soft // 16))

    @property
    def connections(self) -> int | None:
        """About so many are served at once: a server has a few files of its own."""
        return None if self.crowded is None else max(0, self.crowded - OWN)

    def __str__(self) -> str:
        if self.soft is None:
            return "any number of files may be open"
        return f"at most {self.soft} files may be open, so some {self.connections} connections"


def raise_limit(wanted: int = WANTED) -> OpenFiles:
    """Brings the limit as near to `wanted` as is allowed, and never lowers it."""
    for step in (wanted, *STEPS):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        target = step if hard == resource.RLIM_INFINITY else min(step, hard)
        if step > wanted or soft == resource.RLIM_INFINITY or soft >= target:
            continue
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
        except (ValueError, OSError):
            continue
        break
    return OpenFiles.now()


def import_mlx_lm() -> None:
    """Imports mlx-lm, on any thread, and makes what it does to the limit `raise_limit`.

    Nothing of anybody is replaced: the one module that sets it is run with an `import` statement of its own, which
    gives it another `resource`."""
    finder = _Finder()
    with ALONE:
        # New lists: another thread that imports something now may be walking along the one there is.
        sys.meta_path = [finder, *sys.meta_path]
        try:
            importlib.import_module("mlx_lm")
        finally:
            sys.meta_path = [other for other in sys.meta_path if other is not finder]


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != SETS_THE_LIMIT:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        # Python fills this in with its own where it is not there.
        vars(module)["__builtins__"] = {**vars(builtins), "__import__": _import}
        super().exec_module(module)


def _import(name: str, *context: Any, **named: Any) -> Any:
    """The import statement, but for `resource`."""
    if name == resource.__name__:
        return SimpleNamespace(**(vars(resource) | {"setrlimit": _at_least}))
    return builtins.__import__(name, *context, **named)


def _at_least(kind: int, limits: tuple[int, int]) -> None:
    if kind == resource.RLIMIT_NOFILE:
        raise_limit(limits[0])
    else:
        resource.setrlimit(kind, limits)
