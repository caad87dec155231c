"""The laws of the house that no linter knows: sizes, names, who may import what, who may catch and who may read what."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("rollout_server", "adapters", "trainer_client")
ROOMS = (*PACKAGES, "tests", "examples", "benchmarks")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50
BANNED_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "base", "core", "manager"}
READS_THE_ENVIRONMENT = {"rollout_server/config.py"}
CATCHES_EVERYTHING = {"rollout_server/engine/loop.py"}
IGNORED_FOLDERS = {".git", ".venv", "dist", "__pycache__", "demo-output"}
# In two halves, so that this file passes its own test.
INDEX_HOSTS = re.compile(
    "|".join(["py" + r"pi\.org", "python" + "hosted", "pypi" + r"\.python", "ana" + r"conda\.org"])
)

# What each room may import beyond the standard library and itself.
IMPORTS = {
    "rollout_server/errors.py": set(),
    "rollout_server/rollout.py": {"rollout_server.errors"},
    "rollout_server/blas.py": set(),
    "rollout_server/schemas": {"pydantic", "pydantic_core"},
    "trainer_client": {"numpy", "httpx", "safetensors"},
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def every(folders: tuple[str, ...]) -> pytest.MarkDecorator:
    """One test case per file."""
    return pytest.mark.parametrize("path", sources(*folders), ids=name_of)


def places(path: Path, breaks: Callable[[ast.AST], bool]) -> list[str]:
    """`file:line` of every syntax node that breaks a law."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [f"{name_of(path)}:{getattr(node, 'lineno', 1)}" for node in ast.walk(tree) if breaks(node)]


def imported(node: ast.AST, path: Path) -> Iterator[str]:
    """Full names of the modules an import statement reaches."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.level:
        package = path.relative_to(ROOT).parts[: -node.level]
        yield ".".join([*package, *([node.module] if node.module else [])])
    elif isinstance(node, ast.ImportFrom) and node.module:
        yield node.module


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


@every(ROOMS)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES, f"{name_of(path)} is too long: make two files of it"
    long = places(path, lambda node: isinstance(node, Function) and length(node) > MAX_FUNCTION_LINES)
    assert not long, f"functions over {MAX_FUNCTION_LINES} lines: {long}"


def length(function: Function) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def test_no_module_is_named_after_nothing() -> None:
    named = [
        name_of(path) for path in sources(*ROOMS) if BANNED_NAMES & set(path.relative_to(ROOT).with_suffix("").parts)
    ]
    assert not named, f"a name says what is inside: {named}"


@every(PACKAGES)
def test_only_config_reads_the_environment(path: Path) -> None:
    def reads(node: ast.AST) -> bool:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            return node.attr in {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            return any(alias.name.startswith(("environ", "getenv", "putenv")) for alias in node.names)
        return False

    found = places(path, reads)
    assert not found or name_of(path) in READS_THE_ENVIRONMENT, f"read it in rollout_server/config.py: {found}"


@every(PACKAGES)
def test_only_the_step_catches_everything(path: Path) -> None:
    wide = {"Exception", "BaseException"}

    def names(node: ast.AST) -> set[str]:
        return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}

    def catches(node: ast.AST) -> bool:
        if isinstance(node, ast.ExceptHandler):
            return node.type is None or bool(names(node.type) & wide)
        suppresses = isinstance(node, ast.Call) and "suppress" in names(node.func) | {getattr(node.func, "attr", "")}
        return suppresses and any(names(argument) & wide for argument in node.args)

    found = places(path, catches)
    assert len(found) <= (name_of(path) in CATCHES_EVERYTHING), f"catch what you expect, by name: {found}"


@every(PACKAGES)
def test_modules_hold_no_state_and_objects_no_finaliser(path: Path) -> None:
    def breaks(node: ast.AST) -> bool:
        return isinstance(node, ast.Global) or (isinstance(node, Function) and node.name == "__del__")

    found = places(path, breaks)
    assert not found, f"state lives in objects, resources in context managers: {found}"


@pytest.mark.parametrize("room", IMPORTS)
def test_rooms_import_only_what_they_may(room: str) -> None:
    where = ROOT / room
    own = room.removesuffix(".py").replace("/", ".")
    for path in sources(room) if where.is_dir() else [where]:
        allowed = {own, *IMPORTS[room]}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            strange = [
                module
                for module in imported(node, path)
                if module.partition(".")[0] not in sys.stdlib_module_names
                and not any(within(module, package) for package in allowed)
            ]
            assert not strange, f"{name_of(path)}:{node.lineno} imports {strange}, {room} may not"  # type: ignore[attr-defined]


def test_what_is_imported_is_declared() -> None:
    """Every third-party module that the packages import comes from a dependency that pyproject.toml names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["demo"]]
    declared = {re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower() for requirement in requirements}
    owners = importlib.metadata.packages_distributions()
    known = set(PACKAGES) | set(sys.stdlib_module_names) | {"pydantic_core"}
    for path in sources(*PACKAGES):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for module in imported(node, path):
                top = module.partition(".")[0]
                dists = {name.lower() for name in owners.get(top, [])} | {top}
                assert top in known or dists & declared, f"{name_of(path)} imports {top}: declare it in pyproject.toml"


def test_no_file_names_a_package_index() -> None:
    named = []
    for path in ROOT.rglob("*"):
        if path.is_file() and not IGNORED_FOLDERS & set(path.relative_to(ROOT).parts):
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
