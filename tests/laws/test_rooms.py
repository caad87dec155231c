"""The rooms of the house: how many things stand in one, what is too small for a file, and no imports in circles."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.laws.test_house import nodes_of
from tests.laws.test_house import trees as trees

ROOT = Path(__file__).parents[2]
PACKAGES = ("rollout_server", "adapters", "trainer_client", "benchmarks")
MOST_MODULES = 10
LEAST_LINES = 50

# Modules under 50 lines, and why each stands alone.
SMALL = {
    "adapters/kernels/numbers.py": "what the engine gives kernels too, and no part of their text",
    "rollout_server/engine/model/attention/plain.py": "the oracle of a kernel, which stands beside it",
    "rollout_server/__main__.py": "`python -m rollout_server`",
    "rollout_server/commands/asking/sse_client.py": "shared by several commands",
    "rollout_server/commands/demo.py": "a command, named as it is typed",
    "rollout_server/commands/doctor.py": "a command, named as it is typed",
    "rollout_server/commands/download.py": "a command, named as it is typed",
    "rollout_server/commands/terminal/progress.py": "shared by several commands",
    "rollout_server/demo/launch.py": "a program that is started as a process of its own",
    "rollout_server/demo/trainer/evaluation.py": "a part of the example, to be read by itself",
    "rollout_server/demo/trainer/settings.py": "a part of the example, to be read by itself",
    "rollout_server/engine/blame.py": "plain, below every room that does a part of a turn",
    "rollout_server/machine/host_memory.py": "read before MLX is loaded, by doctor too",
    "rollout_server/engine/messages/spans.py": "a check that both sides of the border make",
    "rollout_server/engine/model/device.py": "one thing that the loop asks of the device",
    "rollout_server/engine/model/encoders/encoder.py": "what loading makes and reading uses",
    "rollout_server/models/encoders/attention.py": "what the bodies of all encoders share",
    "rollout_server/engine/ranks/digest.py": "plain, for whoever compares digests and has no arrays",
    "rollout_server/fleet/ranks/group.py": "the one door from processes of ranks to MLX's group",
    "rollout_server/fleet/ranks/patience.py": "a process beside the one it watches, where nothing of MLX is imported",
    "rollout_server/fleet/ranks/words.py": "what both sides of a connection read and write",
    "rollout_server/engine/sampling/margins.py": "plain, for replies as for the device's checks",
    "rollout_server/fleet/ledger/placement.py": "one decision of the ledger, to be read by itself",
    "rollout_server/fleet/tokens.py": "the one door from the controller to transformers and llguidance",
    "rollout_server/machine/gpus.py": "one thing that a fleet asks of the machine",
    "rollout_server/http/observing/tracing.py": "an extra that most servers do without",
    "rollout_server/http/requests/queries.py": "one part of a request that several routes read",
    "rollout_server/http/requests/spans.py": "one part of a request that several routes read",
    "rollout_server/quoting.py": "a leaf that every room may import",
    "rollout_server/schemas/openai/embeddings.py": "the bodies of one route",
    "rollout_server/schemas/spans.py": "the bodies of one route",
    "rollout_server/schemas/vllm/adapters.py": "the bodies of one route",
    "rollout_server/text/pictures/kept.py": "what outlives a request, apart from what a request reads",
    "rollout_server/text/pictures/picture.py": "a noun that crosses to the engine",
    "rollout_server/text/pictures/reader.py": "what HTTP knows of a model's pictures",
    "rollout_server/text/token_strings.py": "one way from ids to text",
    "rollout_server/versions/adapter_directory.py": "one way in which versions come in",
    "adapters/versions/retention.py": "a rule that the registry keeps and the state directory foretells",
    "adapters/placement.py": "plain, below whatever knows arrays",
    "adapters/resident/layers/embedding.py": "one kind of layer, beside the others",
    "adapters/versions/packed.py": "one part of what survives a crash",
    "rollout_server/engine/model/checkpoint/corrections/routing.py": "one correction of what a module computes",
    "adapters/versions/reserve.py": "one part of what survives a crash",
    "adapters/versions/sealed.py": "one part of what survives a crash",
    "trainer_client/adapter/wrappers.py": "a rule of its own, said once",
    "trainer_client/data/padding.py": "one function of a batch",
    "trainer_client/verbs/json_call.py": "what all verbs share",
    "benchmarks/studies/gpu/latency.py": "one question to a GPU",
    "benchmarks/sections/order.py": "a table",
    "benchmarks/servers/peer_server.py": "a process of its own, or its start",
}

# Loaded without MLX, whatever they import; the contract in pyproject.toml says the same of the import statements.
PLAIN = (
    "adapters.bundle",
    "adapters.formats.read",
    "adapters.prepare",
    "adapters.versions.registry",
    "adapters.versions.store",
    "rollout_server.engine.batch.joining",
    "rollout_server.engine.batch.row",
    "rollout_server.engine.checks",
    "rollout_server.engine.kv_cache.prompt",
    "rollout_server.engine.kv_cache.sizes",
    "rollout_server.engine.kv_cache.ledger",
    "rollout_server.engine.blame",
    "rollout_server.engine.messages.rollouts",
    "rollout_server.engine.messages.status",
    "rollout_server.engine.requests.queue",
    "rollout_server.engine.sampling.margins",
    "rollout_server.engine.scheduling.pause",
    "rollout_server.engine.scheduling.latency",
    "rollout_server.engine.scheduling.throughput",
    "rollout_server.engine.scheduling.turn_budget",
    "rollout_server.engine.scheduling.turn_costs",
    "rollout_server.engine.timeline",
    "rollout_server.fleet.codec.frames",
    "rollout_server.text.stop_strings",
    "rollout_server.text.detokenize",
)
HEAVY = ("mlx", "mlx_lm", "transformers", "llguidance")


def modules(*packages: str) -> dict[str, Path]:
    """Every module by its full name; a package under its own."""
    found = {}
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imported(module: str, path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """Our own modules that a module imports, wherever the statement stands."""
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                if name in known or base in known:
                    yield name if name in known else base


def circles(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """What can be left over and over again without anything that does not lead back: peeled from both ends."""
    left = {name: set(targets) for name, targets in arrows.items()}
    while True:
        pointed = {target for targets in left.values() for target in targets}
        loose = {name for name, targets in left.items() if not targets & left.keys() or name not in pointed}
        if not loose:
            return [sorted(left)] if left else []
        left = {name: targets - loose for name, targets in left.items() if name not in loose}


@pytest.fixture(scope="module")
def arrows() -> dict[str, set[str]]:
    known = modules(*PACKAGES)
    return {name: set(imported(name, path, known)) - {name} for name, path in known.items()}


def test_no_room_holds_more_than_ten_modules() -> None:
    folders = Counter(
        path.parent.relative_to(ROOT).as_posix()
        for package in (*PACKAGES, "examples", "tests")
        for path in (ROOT / package).rglob("*.py")
        if path.name not in ("__init__.py", "conftest.py")
    )
    full = {folder: count for folder, count in folders.items() if count > MOST_MODULES}
    assert not full, f"more than {MOST_MODULES}, which noun wants a room: {full}"


def test_every_room_says_what_it_is_for() -> None:
    """One sentence in its `__init__.py`, and nothing else; the client's names what it offers."""
    talkative = []
    for path in modules(*PACKAGES).values():
        if path.name == "__init__.py" and path.parent.name not in ("trainer_client", "trainer", "rollout_server"):
            body = ast.parse(path.read_text(encoding="utf-8")).body
            if len(body) != 1 or not ast.get_docstring(ast.Module(body, [])):
                talkative.append(path.relative_to(ROOT).as_posix())
    assert not talkative, f"a docstring and nothing else: {talkative}"


def test_every_room_is_on_the_map_and_in_the_tree() -> None:
    written = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = {path.parent.relative_to(ROOT).as_posix() for path in modules(*PACKAGES).values()}
    named = re.findall(r"^(?:### |\| )`([\w/]+)/`", written, flags=re.MULTILINE)
    missing = sorted(rooms - {*named})
    assert not missing, f"docs/architecture.md: {missing}"
    gone = sorted(room for room in named if not list((ROOT / room).glob("*.py")))
    assert named and not gone, f"on the map and not in the tree: {gone}"


def test_small_modules_have_a_reason() -> None:
    small = {
        path.relative_to(ROOT).as_posix()
        for path in modules(*PACKAGES).values()
        if path.name != "__init__.py" and len(path.read_text("utf-8").splitlines()) < LEAST_LINES
    }
    assert not small - SMALL.keys(), f"where do these belong: {sorted(small - SMALL.keys())}"
    assert not SMALL.keys() - small, f"they have grown or gone: {sorted(SMALL.keys() - small)}"


def test_a_docstring_is_no_half_of_a_sentence() -> None:
    """It neither goes on where another ended, nor hangs on a name, as "of its prompt" and "whether it runs" do."""
    found = []
    for path in modules(*PACKAGES).values():
        for node in nodes_of(path):
            text = node.value.value if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) else None
            if isinstance(text, str) and text.lower().startswith(("and ", "of ", "whether ")):
                found.append(f"{path.relative_to(ROOT).as_posix()}:{node.lineno}")
    assert not found, f"a docstring is a sentence of its own: {found}"


def test_no_module_imports_itself_by_way_of_others(arrows: dict[str, set[str]]) -> None:
    assert not circles(arrows)


def test_no_room_imports_itself_by_way_of_others(arrows: dict[str, set[str]]) -> None:
    """A module of a folder that has rooms stands for itself: it may be above or below them."""
    folders = {name.rpartition(".")[0] for name in arrows}
    with_rooms = {folder.rpartition(".")[0] for folder in folders if "." in folder}

    def room(name: str) -> str:
        folder = name.rpartition(".")[0]
        return name if folder in with_rooms or name in folders else folder

    between: dict[str, set[str]] = defaultdict(set)
    for name, targets in arrows.items():
        between[room(name)] |= {room(target) for target in targets} - {room(name)}
    assert not circles(between)


def test_plain_python_loads_no_array_framework() -> None:
    """In one process, module after module: the first after which something heavy is there has loaded it."""
    program = (
        f"import importlib, sys\nfor module in {PLAIN!r}:\n    importlib.import_module(module)\n"
        f"    loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "    if loaded:\n        sys.exit(f'{module} loads {loaded}')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
