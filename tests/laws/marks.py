"""Which tests start servers, load models and compare floats follows from what they call, so that nobody has to mark
them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType

import pytest

PROCESSES = frozenset({"live_server", "server_here", "subprocess", "Popen"})
MODELS = frozenset({"Driver", "EngineOptions"})
"""What loads a model for an engine mentions one of them."""
BOUNDS = frozenset({"assert_near", "TINY", "GOLDEN", "EMBEDDED", "amplified", "relative", "of_softmax"})
"""The names of tests/support/numbers/bounds.py."""
FOLLOWED = ("tests.", "rollout_server.demo.")
SECONDS = {"long": 10.0, "server": 2.0, "model": 0.5}
"""Of a test with the mark, the first that it has."""
LARGER = 4
"""Times the others of its grid, for a case that is `long`."""


def names_in(code: CodeType) -> Iterator[str]:
    """Every global name and attribute that the code mentions, with the functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)


def reaches(functions: Iterable[FunctionType], wanted: frozenset[str]) -> bool:
    """Whether one of the functions mentions a wanted name, or calls what does: functions and classes of tests/ and of
    the demo, which starts a server, are followed wherever they are imported from."""
    left, seen = list(functions), set()
    while left:
        function = left.pop()
        if function not in seen:
            seen.add(function)
            names, called = followed(function)
            if names & wanted:
                return True
            left += called
    return False


@cache
def followed(function: FunctionType) -> tuple[frozenset[str], tuple[FunctionType, ...]]:
    """The names that it mentions, and the functions to follow that they stand for."""
    names = frozenset(names_in(function.__code__))
    known = [function.__globals__[name] for name in names & function.__globals__.keys()]
    return names, tuple(each for value in known for each in ours(value, names))


def ours(value: object, names: frozenset[str]) -> list[FunctionType]:
    """The functions that a global stands for: itself, a class's methods, a module's that are mentioned."""
    if inspect.ismodule(value):
        found = [vars(value).get(name) for name in names] if value.__name__.startswith(FOLLOWED) else []
    else:
        found = list(vars(value).values()) if inspect.isclass(value) else [value]
    plain = [inspect.unwrap(each) for each in found if callable(each)]
    return [each for each in plain if isinstance(each, FunctionType) and each.__module__.startswith(FOLLOWED)]


def seconds(item: pytest.Item) -> float:
    """About how long a test of its kind takes; of a `long` one that says how long it may take, a tenth of that. A case
    that a grid leaves to `long` is like its other cases, or somewhat larger."""
    kind = next((usual for name, usual in SECONDS.items() if name != "long" and item.get_closest_marker(name)), 0.02)
    if item.get_closest_marker("long") is None:
        return kind
    allowed = item.get_closest_marker("timeout")
    if allowed is not None:
        return max(SECONDS["long"], allowed.args[0] / 10)
    whole = {mark.name for mark in getattr(getattr(item, "obj", None), "pytestmark", ())}
    return SECONDS["long"] if "long" in whole else LARGER * kind


def heaviest_first(items: list[pytest.Item]) -> None:
    """Puts files that are likely to take long before the others, for processes that take them one by one: a long file
    at the end would be waited for."""
    taken: dict[Path, float] = {}
    for item in items:
        taken[item.path] = taken.get(item.path, 0.0) + seconds(item)
    items.sort(key=lambda item: -taken[item.path])


@cache
def names_of(functions: tuple[FunctionType, ...]) -> tuple[str, ...]:
    """The marks that follow for a test of these functions; its cases have the same."""
    kinds = (("server", PROCESSES), ("model", MODELS), ("numeric", BOUNDS))
    return tuple(name for name, wanted in kinds if reaches(functions, wanted))


def mark(items: list[pytest.Item]) -> None:
    """Adds `server`, `model` and `numeric` where they follow."""
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        fixtures = [definitions[-1].func for definitions in item._fixtureinfo.name2fixturedefs.values()]
        functions = [inspect.unwrap(each) for each in (item.function, *fixtures)]
        for name in names_of(tuple(each for each in functions if isinstance(each, FunctionType))):
            item.add_marker(name)
