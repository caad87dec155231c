"""TAB in the shells themselves, each as its user has it: `--install-completion` in a home of its own, then keys."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.live_server import PATIENCE_S, ROOT, Server
from trainer_client import RolloutClient

BELL = "\x07"
PROGRAM = f"#!{sys.executable}\nfrom rollout_server.cli import main\nmain()\n"


def missing(shell: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(shell) is None, reason=f"{shell} is not installed")


@pytest.fixture(scope="module")
def port(server: Server, adapter: Path) -> str:
    with RolloutClient(server.url) as client:
        client.push("offered", adapter)
    return server.url.rpartition(":")[2]


@pytest.fixture
def environment(tmp_path: Path, port: str) -> dict[str, str]:
    """A home where nothing is, and the command on the path under its name."""
    folder = tmp_path / "bin"
    folder.mkdir()
    command = folder / "rollout-server"
    command.write_text(PROGRAM)
    command.chmod(0o755)
    path = os.pathsep.join((str(folder), os.environ["PATH"]))
    own = {"HOME": str(tmp_path), "PATH": path, "PYTHONPATH": str(ROOT), "TERM": "dumb", "LC_ALL": "C.UTF-8"}
    return own | {"ROLLOUT_PORT": port, "ROLLOUT_HOST": "127.0.0.1"}


def said(shell: str, script: str, environment: dict[str, str]) -> str:
    done = subprocess.run([shell, "-c", script], env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def install(shell: str, environment: dict[str, str]) -> None:
    """By the command's own option, which finds out what shell has called it."""
    said(shell, "rollout-server --install-completion; true", environment)


class Terminal:
    """A shell at a terminal, as whoever types sees it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._shown = ""

    def type(self, keys: str) -> None:
        self._shown = ""
        os.write(self._descriptor, keys.encode())

    def until(self, pattern: str) -> str:
        """What has been shown since the last keys, once the pattern is found there."""
        end = time.monotonic() + PATIENCE_S
        while not re.search(pattern, self._shown):
            assert time.monotonic() < end, self._shown
            if select.select([self._descriptor], [], [], 0.1)[0]:
                self._shown += os.read(self._descriptor, 65536).decode(errors="replace")
        return self._shown


@contextmanager
def terminal(words: list[str], environment: dict[str, str]) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        words, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    ) as shell:
        os.close(theirs)
        try:
            yield Terminal(ours)
        finally:
            shell.kill()
            os.close(ours)


def typed(shell: Terminal) -> None:
    """Commands, values of options, and what the running server knows."""
    shell.type("rollout-server gener\t")
    shell.until(r"gener\S*ate ")
    shell.type("--policy off\t")
    shell.until(r"off\S*ered")
    shell.type("\x15rollout-server serve --page of\t")
    shell.until(r"of\S*f ")


@missing("zsh")
@pytest.mark.long
def test_zsh(environment: dict[str, str]) -> None:
    install("zsh", environment)
    with terminal(["zsh", "-i"], environment) as shell:
        # What is installed is loaded by the first TAB of a shell, which completes nothing yet.
        shell.type("rollout-server gener\t")
        shell.until(BELL)
        shell.type("\x15")
        typed(shell)


@missing("bash")
def test_bash(environment: dict[str, str]) -> None:
    install("bash", environment)
    with terminal(["bash", "-i"], environment) as shell:
        typed(shell)


@missing("fish")
@pytest.mark.long
def test_fish(environment: dict[str, str]) -> None:
    """It says on a line each what TAB would offer, and what that is."""
    install("fish", environment)

    def offered(line: str) -> list[str]:
        return [found.split("\t")[0] for found in said("fish", f"complete -C '{line}'", environment).splitlines()]

    assert offered("rollout-server gener") == ["generate"]
    assert sorted(offered("rollout-server generate --policy off")) == ["offered", "offered@1"]
    assert sorted(offered("rollout-server serve --page o")) == ["off", "on"]
