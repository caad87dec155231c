"""A reader who does what a page says, from its first block to its last.

`sh` goes line by line: `rollout-server serve` starts a server, which the rest of the page talks to; our other commands
run in this process, everything else in bash. `python` blocks run one after the other in one process, as in one
session. A block with a `title` is saved under it, `json` is parsed. All of it happens in a folder of the page's own.

Two things are changed on the way: the server's address is that of the test's server, and work is made smaller
(`SMALLER`).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from typer.testing import CliRunner

from rollout_server.cli import app
from tests.docs.pages import ROOT, Block
from tests.support.live_server import live_server

ADDRESSES = ("127.0.0.1:8000", "localhost:8000")
"""How pages call the server."""
SMALLER: Mapping[str, str] = {
    "range(30)": "range(2)",
    "range(32)": "range(4)",
    "range(15)": "range(2)",
    "range(64)": "range(8)",
    "--steps 200": "--steps 1",
    "--clients 1,8 --max-tokens 64": "--clients 1,2 --max-tokens 4 --prompt-tokens 4 --rounds 1",
}
PATIENCE_S = 300
SESSION = """
import json, sys, traceback
names = {"__name__": "__main__"}
for line in sys.stdin:
    page, number, code = json.loads(line)
    try:
        exec(compile("\\n" * (number - 1) + code, page, "exec"), names)
        fault = ""
    except BaseException:
        fault = traceback.format_exc()
    print("\\n" + json.dumps({"fault": fault}), flush=True)
"""
"""Runs one block after the other; a traceback names the lines of the page."""


@dataclass
class Reader:
    """One page's reader, in a folder with what readers have (`tests/docs/conftest.py`)."""

    folder: Path
    url: str
    stack: ExitStack = field(default_factory=ExitStack)
    session: subprocess.Popen[str] | None = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def follow(self, block: Block) -> None:
        """Does what the block says; raises `AssertionError` where that fails."""
        if block.title:
            (self.folder / block.title).write_text(self.here(block.code), encoding="utf-8")
        elif block.language == "python":
            self.run_python(block)
        elif block.language == "sh":
            for line in re.sub(r"\\\n\s*", "", block.code).splitlines():
                if line.strip() and not line.startswith("#"):
                    self.run_line(self.here(line))
        elif block.language == "json":
            json.loads(block.code)
        else:
            raise AssertionError(f"nobody knows how to read {block.language or 'a block without a language'}")

    def here(self, text: str) -> str:
        """The text with the server's address, and with less to do."""
        for written, instead in SMALLER.items():
            text = text.replace(written, instead)
        for address in ADDRESSES:
            text = text.replace(address, self.url.partition("//")[2])
        return text

    def run_line(self, line: str) -> None:
        words = shlex.split(line, comments=True)
        settings = dict(word.split("=", 1) for word in words if re.match(r"ROLLOUT_\w+=", word))
        command = [word for word in words if not re.match(r"ROLLOUT_\w+=", word)]
        if command[:2] == ["rollout-server", "serve"]:
            running = live_server(None, *command[2:], environment=settings, folder=self.folder)
            self.url = self.stack.enter_context(running).url
        elif command[0] == "rollout-server" and not {"|", ">", ";", "&&"} & set(command):
            self.run_ours(line, command[1:], settings)
        else:
            self.run_bash(line)

    def run_ours(self, line: str, command: list[str], settings: Mapping[str, str]) -> None:
        """A command of ours; paths in it are of the page's folder."""
        host, _, port = self.url.partition("//")[2].partition(":")
        address = {"ROLLOUT_HOST": host, "ROLLOUT_PORT": port}
        there = [str(self.folder / word) if (self.folder / word).exists() else word for word in command]
        done = CliRunner().invoke(app, there, env={"ROLLOUT_ADMIN_KEY": None, **address, **settings})
        assert done.exit_code == 0 and done.output.strip(), f"{line}\n{done.output}\n{done.exception}"

    def run_bash(self, line: str) -> None:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        ran = subprocess.run(
            ["bash", "-o", "pipefail", "-c", line],
            capture_output=True,
            text=True,
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": path},
            timeout=PATIENCE_S,
        )
        assert ran.returncode == 0 and '"error"' not in ran.stdout, f"{line}\n{ran.stdout}\n{ran.stderr}"

    def run_python(self, block: Block) -> None:
        if self.session is None:
            started = subprocess.Popen(
                [sys.executable, "-c", SESSION],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
            self.session = self.stack.enter_context(started)
        assert self.session.stdin is not None and self.session.stdout is not None
        self.session.stdin.write(json.dumps([block.page, block.line, self.here(block.code)]) + "\n")
        self.session.stdin.flush()
        for line in self.session.stdout:
            if line.startswith('{"fault": '):
                fault = json.loads(line)["fault"]
                assert not fault, fault
                return
        raise AssertionError(f"{block.page}: the session of Python ended")
