"""The README and the guides say what is so: their code runs as written, what they name and link to exists."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rollout_server.cli import COMMANDS, app
from tests.support import tiny_models
from tests.support.live_server import live_server, server_here
from tests.support.numbers.bounds import EMBEDDED

ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))
}
README = PAGES["README.md"]
GUIDE = "\n".join(text for page, text in PAGES.items() if page.startswith("docs/guide/"))
GUARANTEES = PAGES["docs/guarantees.md"]


def code_block() -> str:
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    return str(block)


def run(code: str, *arguments: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Where the embedded model is served."""
    with server_here(None) as server:
        yield server.url


def test_the_trainer_loop_and_the_example_run_as_written(url: str) -> None:
    """Only the port is another one, and there are fewer steps of fewer prompts."""
    example = (ROOT / "examples" / "grpo_loop.py").read_text(encoding="utf-8")
    for code in (code_block(), example):
        for written, instead in (("http://127.0.0.1:8000", url), ("range(30)", "range(3)"), ("range(32)", "range(4)")):
            assert written in code
            code = code.replace(written, instead)
        assert len(run(code)) == 3


def test_the_example_of_replay_and_probe_runs_as_written(url: str) -> None:
    example = (ROOT / "examples" / "check_rollouts.py").read_text(encoding="utf-8")
    *rows, probed = run(example.replace("http://127.0.0.1:8000", url))
    assert [line.split(": ")[1] for line in rows] == ["exact"] * 8
    assert probed.startswith("base@0: ") and float(probed.split("kl ")[1]) <= EMBEDDED.of_logprobs([], 100) ** 2 / 2


def commands() -> list[str]:
    """The lines of the guide's block that begins with starting a server."""
    blocks = re.findall(r"```sh\n(.*?)```", GUIDE, flags=re.DOTALL)
    (block,) = (block for block in blocks if block.startswith("rollout-server serve"))
    return str(block).splitlines()


def test_the_commands_run_as_written(tmp_path: Path) -> None:
    """`DIR` and the like are named; only the port is another one, and what is measured smaller."""
    serve, *others = commands()
    model = tiny_models.build("qwen3", tmp_path / "model")
    tensors, config = tiny_models.random_adapter(tiny_models.linear_layers(model), 4, 1)
    adapter = tiny_models.save_adapter(tmp_path / "adapter", tensors, config)
    places = {
        "DIR_OR_HUB_ID": str(model),
        "policy=DIR": f"policy={adapter}",
        "DIR": str(adapter),
        "state": str(tmp_path),
        "FILE": str(ROOT / "LICENSE"),
    }
    program, command, *options = [places.get(word, word) for word in shlex.split(serve)]
    assert (program, command) == ("rollout-server", "serve")
    with live_server(None, *options) as server:
        port = server.url.rpartition(":")[2]
        # tests/machine/test_doctor.py runs the last one; measuring takes it seconds.
        assert others.pop() == "rollout-server doctor"
        for line in others:
            words = [
                places.get(word, word).replace("localhost:8000", f"127.0.0.1:{port}") for word in shlex.split(line)
            ]
            if "bench" in words:
                words += ["--max-tokens", "4", "--prompt-tokens", "4", "--rounds", "1"]
            if words[0] == "rollout-server":
                done = CliRunner().invoke(app, words[1:], env={"ROLLOUT_PORT": port, "ROLLOUT_ADMIN_KEY": None})
                status, said = done.exit_code, done.output
            else:
                ran = subprocess.run(words, capture_output=True, text=True, cwd=adapter, timeout=100)
                status, said = ran.returncode, ran.stdout
            assert status == 0 and said.strip() and '"error"' not in said, (line, said)


def test_every_command_is_in_the_guide() -> None:
    for command in COMMANDS:
        name = command.__name__
        assert f"rollout-server {name}" in GUIDE or f"make {name} " in README, name


def test_every_guarantee_names_a_test() -> None:
    rows = [line for line in GUARANTEES.splitlines() if line.startswith("| ") and line != "| guarantee | held by |"]
    assert len(rows) >= 40
    for row in rows:
        says, held_by = row.strip("| ").split(" | ")
        assert says.endswith("."), f"a guarantee is a sentence: {says}"
        assert re.search(r"`(tests/|test_|make test-)", held_by), row


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_exists(page: str) -> None:
    """Tests by their function or path, files of ours, and what is linked to, with its heading."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    for name in set(re.findall(r"`(test_\w+)`", PAGES[page])):
        assert any(f"def {name}(" in text for text in sources), name
    paths = re.findall(
        r"`(tests/[\w/]+)`|`((?:rollout_server|adapters|trainer_client|tests|docs)/[\w/]+\.\w+)`", PAGES[page]
    )
    for path in (folder or file for folder, file in paths):
        assert (ROOT / path).exists() or page == "CHANGELOG.md", path
    for link in re.findall(r"\]\(((?!http)[^)\s]+)\)", PAGES[page]):
        path, _, heading = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.exists(), link
        assert not heading or heading in anchors(target.read_text(encoding="utf-8")), link


def anchors(text: str) -> set[str]:
    """The headings of a page, as links name them."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_loop_stays_a_page() -> None:
    loop = code_block().split("for step in")[1]
    assert len(loop.splitlines()) <= 20 and len(code_block().splitlines()) <= 50
