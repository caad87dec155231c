"""The laws of the house that no linter knows: sizes, names, who may import, catch and read what."""

from __future__ import annotations

import ast
import gc
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("rollout_server", "adapters", "trainer_client")
ROOMS = (*PACKAGES, "tests", "examples", "benchmarks")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50
BANNED_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "base", "core", "manager"}
READS_THE_ENVIRONMENT = "rollout_server/config.py"
CATCHES_EVERYTHING = (
    "rollout_server/engine/blame.py",
    "rollout_server/http/replies/row_rewards.py",
    "rollout_server/text/tool_calls.py",
)
"""Around a step, whose rows fail by name whatever it raises; around the reward of a row, which never loses a rollout
though it runs a model's own template; and around mlx-lm's parsers of what a model wrote."""
DOOR = "tests/support/engine/door.py"
NOT_OURS = {
    ".git",
    ".venv",
    ".venv-peers",
    ".venv-ray",
    ".mypy_cache",
    ".ruff_cache",
    ".pytest_cache",
    "dist",
    "__pycache__",
    "demo-output",
    "site",
}
# In two halves, so that this file passes its own test.
INDEX_HOSTS = re.compile(
    "|".join(["py" + r"pi\.org", "python" + "hosted", "pypi" + r"\.python", "ana" + r"conda\.org"])
)

# What each room may import beyond the standard library and itself.
IMPORTS = {
    "rollout_server/errors.py": set(),
    "rollout_server/quoting.py": set(),
    "rollout_server/grammar.py": set(),
    "rollout_server/text/pictures/picture.py": set(),
    "rollout_server/rollout.py": {
        "rollout_server.errors",
        "rollout_server.grammar",
        "rollout_server.text.pictures.picture",
        "rollout_server.quoting",
    },
    "rollout_server/machine/blas.py": set(),
    "rollout_server/schemas": {"pydantic", "pydantic_core", "rollout_server.quoting"},
    "trainer_client": {"numpy", "httpx", "safetensors"},
}

# Public parts of pydantic and of litestar that live in distributions of their own.
COMPANIONS = {"pydantic_core", "msgspec"}
CALLED = {"PIL": "pillow"}
"""Modules with another name than what is installed."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(*rooms: str) -> list[Path]:
    """The Python files of folders, or single files."""
    places = (ROOT / room for room in rooms)
    return sorted(path for place in places for path in ([place] if place.is_file() else place.rglob("*.py")))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    """Every node of the file, in the order of `ast.walk`."""
    return tuple(ast.walk(tree_of(path)))


@pytest.fixture(scope="module", autouse=True)
def trees() -> Iterator[None]:
    """They are a million objects and all kept: the collector would look through them again and again, for three
    quarters of the time of parsing, and in tests of other files too."""
    gc.disable()
    yield
    nodes_of.cache_clear()
    tree_of.cache_clear()
    gc.enable()


def places(paths: Iterable[Path], breaks: Callable[[ast.AST], bool]) -> list[str]:
    """`file:line` of every syntax node that breaks a law."""
    found = []
    for path in paths:
        found += [f"{name_of(path)}:{getattr(node, 'lineno', 1)}" for node in nodes_of(path) if breaks(node)]
    return found


def imports(paths: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """(`file:line`, full name of the module) of every import statement, wherever it stands."""
    for path in paths:
        name, folders = name_of(path), path.relative_to(ROOT).parts
        for node in nodes_of(path):
            if isinstance(node, ast.Import):
                yield from ((f"{name}:{node.lineno}", alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                package = folders[: -node.level] if node.level else ()
                yield f"{name}:{node.lineno}", ".".join([*package, *([node.module] if node.module else [])])


def top(module: str) -> str:
    return module.partition(".")[0]


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def test_files_are_short() -> None:
    long = [name_of(path) for path in sources(*ROOMS) if len(path.read_text("utf-8").splitlines()) > MAX_FILE_LINES]
    assert not long, f"over {MAX_FILE_LINES} lines, which noun wants out of: {long}"


def test_functions_are_short() -> None:
    def breaks(node: ast.AST) -> bool:
        return isinstance(node, Function) and (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION_LINES

    found = places(sources(*ROOMS), breaks)
    assert not found, f"functions over {MAX_FUNCTION_LINES} lines: {found}"


def test_no_module_is_named_after_nothing() -> None:
    named = [
        name_of(path) for path in sources(*ROOMS) if BANNED_NAMES & set(path.relative_to(ROOT).with_suffix("").parts)
    ]
    assert not named, f"a name says what is inside: {named}"


def test_only_config_reads_the_environment() -> None:
    def reads(node: ast.AST) -> bool:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            return node.attr in {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            return any(alias.name.startswith(("environ", "getenv", "putenv")) for alias in node.names)
        return False

    # blas.py sets one variable for MLX before MLX is imported; it reads none for us.
    allowed = {READS_THE_ENVIRONMENT, "rollout_server/machine/blas.py"}
    found = places((path for path in sources(*PACKAGES) if name_of(path) not in allowed), reads)
    assert not found, f"read it in rollout_server/config.py: {found}"


def test_only_the_step_catches_everything() -> None:
    wide = {"Exception", "BaseException"}

    def names(node: ast.AST) -> set[str]:
        return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}

    def catches(node: ast.AST) -> bool:
        if isinstance(node, ast.ExceptHandler):
            return node.type is None or bool(names(node.type) & wide)
        suppresses = isinstance(node, ast.Call) and "suppress" in names(node.func) | {getattr(node.func, "attr", "")}
        return suppresses and any(names(argument) & wide for argument in node.args)

    found = places(sources(*PACKAGES), catches)
    assert [place.partition(":")[0] for place in found] == list(CATCHES_EVERYTHING), f"catch by name: {found}"


def test_modules_hold_no_state_and_objects_no_finaliser() -> None:
    def breaks(node: ast.AST) -> bool:
        return isinstance(node, ast.Global) or (isinstance(node, Function) and node.name == "__del__")

    found = places(sources(*PACKAGES), breaks)
    assert not found, f"state lives in objects, resources in context managers: {found}"


@pytest.mark.parametrize("room", IMPORTS)
def test_rooms_import_only_what_they_may(room: str) -> None:
    allowed = {room.removesuffix(".py").replace("/", "."), *IMPORTS[room]}
    strange = [
        f"{place} imports {module}"
        for place, module in imports(sources(room))
        if top(module) not in sys.stdlib_module_names and not any(within(module, package) for package in allowed)
    ]
    assert not strange, f"{room} may not: {strange}"


def test_tests_look_into_the_engine_through_one_door() -> None:
    reached = re.compile(r"\b(engine|reader|scorer|scoring|registry|resident|policies)\._[a-z]")
    inside = [name_of(path) for path in sources("tests", "benchmarks") if reached.search(path.read_text("utf-8"))]
    assert inside == [DOOR], f"give {DOOR} a method for it: {inside}"


def test_what_is_imported_is_declared() -> None:
    """Every third-party module that the packages import comes from a dependency that pyproject.toml names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *extras["demo"], *extras["ray"]]
    declared = {re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower().replace("_", "-") for requirement in requirements}
    known = {*PACKAGES, *sys.stdlib_module_names, *COMPANIONS}
    strange = [
        f"{place} imports {module}"
        for place, module in imports(sources(*PACKAGES))
        if top(module) not in known and CALLED.get(top(module), top(module)).lower().replace("_", "-") not in declared
    ]
    assert not strange, f"declare it in pyproject.toml: {strange}"


def test_no_file_names_a_package_index() -> None:
    named = []
    for folder, folders, files in os.walk(ROOT):
        # An environment has a hundred times our files.
        folders[:] = [name for name in folders if name not in NOT_OURS]
        for path in (Path(folder, name) for name in files if name not in NOT_OURS):
            text = path.read_bytes().decode("utf-8", errors="ignore")
            if INDEX_HOSTS.search(text) or "index-" + "url" in text.replace("--no-emit-index-" + "url", ""):
                named.append(name_of(path))
    assert not named, f"installs go through each machine's own settings: {named}"


def test_the_lock_has_a_hash_for_every_package() -> None:
    for lock in ROOT.glob("requirements*.lock.txt"):
        text = lock.read_text(encoding="utf-8")
        pins = re.findall(r"^[a-z0-9][^ \n]*==.*(?:\n .*)*", text, flags=re.MULTILINE)
        assert pins, f"{lock.name} locks nothing"
        bare = [pin.split()[0] for pin in pins if "--hash=sha256:" not in pin]
        assert not bare, f"{lock.name}: no hash for {bare}"


def test_every_error_has_a_status_and_a_class_in_the_client() -> None:
    from rollout_server.http import problems
    from trainer_client.errors import ServerError, error_class

    errors = set(problems.subclasses())
    assert errors == set(problems.TABLE), "rollout_server/http/problems.py: TABLE"
    unknown = [error.code for error in errors if error_class(error.code) is ServerError]
    assert not unknown, f"trainer_client/errors.py has no class for {unknown}"
