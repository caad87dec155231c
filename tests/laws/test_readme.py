"""The README and the guide say what is so: examples run as written, every command is told of, guarantees name tests.

What blocks of code do, and where links lead, is looked at in tests/docs."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rollout_server.cli import COMMANDS
from tests.support.live_server import server_here
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


@pytest.mark.long
def test_the_example_of_a_loop_runs_as_written(url: str) -> None:
    """Only the port is another one, and there are fewer steps of fewer prompts."""
    code = (ROOT / "examples" / "grpo_loop.py").read_text(encoding="utf-8")
    for written, instead in (("http://127.0.0.1:8000", url), ("range(30)", "range(3)"), ("range(32)", "range(4)")):
        assert written in code
        code = code.replace(written, instead)
    assert len(run(code)) == 3


def test_the_example_of_replay_and_probe_runs_as_written(url: str) -> None:
    example = (ROOT / "examples" / "check_rollouts.py").read_text(encoding="utf-8")
    *rows, probed = run(example.replace("http://127.0.0.1:8000", url))
    assert [line.split(": ")[1] for line in rows] == ["exact"] * 8
    assert probed.startswith("base@0: ") and float(probed.split("kl ")[1]) <= EMBEDDED.of_logprobs([], 100) ** 2 / 2


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


def test_the_loop_stays_a_page() -> None:
    loop = code_block().split("for step in")[1]
    assert len(loop.splitlines()) <= 20 and len(code_block().splitlines()) <= 50
