"""A newcomer's first ten minutes, timed: `python -m benchmarks.studies.newcomer [--keep] [--json]`.

The commands and the code are those of docs/quick-start.md, read from the page: in a copy of the repository, with an
empty home and none of this environment but what says where packages come from. Another port is used where 8000 is
taken. Each step is checked: the completions change, and the page shows both versions. Where there is a browser, as
`make test-page` has one, it looks at the page; else what the page would draw is read.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen

from tests.docs.pages import ROOT, Block, page_of
from tests.page.browser import browser, missing

QUICK_START = ROOT / "docs" / "quick-start.md"
PORT = 8000
KEPT = re.compile(r"(PIP|UV|SSL)_\w+|LANG|\w+_proxy|\w+_PROXY")
"""Variables of this environment that an install may need; no other is passed on."""
START_S, INSTALL_S, COMMAND_S = 300, 1800, 600
LOOK_S = 60.0


@dataclass(frozen=True)
class Step:
    """What was done, how long it took, and what came of it."""

    name: str
    seconds: float
    said: str


class Steps(NamedTuple):
    """The blocks of the page, in its order."""

    install: Block
    serve: Block
    ask: Block
    teach: Block
    push: Block
    again: Block


class Newcomer:
    """Somebody with a clone of the repository and nothing else."""

    def __init__(self, folder: Path, port: int) -> None:
        self.clone, self.port = folder / "rollout-server", port
        home = folder / "home"
        home.mkdir()
        passed = {name: value for name, value in os.environ.items() if KEPT.fullmatch(name)}
        self.environment = {
            **passed, "HOME": str(home), "PATH": "/usr/local/bin:/usr/bin:/bin", "ROLLOUT_PORT": str(port),
            "PYTHON": str(Path(sys.base_prefix) / "bin" / "python3"),
        }  # fmt: skip
        self.steps: list[Step] = []

    def here(self, code: str) -> str:
        return code.replace(f"127.0.0.1:{PORT}", f"127.0.0.1:{self.port}").replace(
            f"localhost:{PORT}", f"127.0.0.1:{self.port}"
        )

    def bash(self, code: str, limit_s: float = COMMAND_S) -> str:
        """What the block prints; in the environment of the install, once there is one."""
        active = self.clone / ".venv" / "bin" / "activate"
        lines = ["set -e", f". {active}" if active.exists() else "", self.here(code)]
        done = subprocess.run(
            ["bash", "-c", "\n".join(lines)], cwd=self.clone, env=self.environment, capture_output=True, text=True,
            timeout=limit_s,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"This failed ({done.returncode}):\n{code}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    @contextmanager
    def timed(self, name: str) -> Iterator[list[str]]:
        said: list[str] = []
        begun = time.perf_counter()
        yield said
        self.steps.append(Step(name, time.perf_counter() - begun, " ".join(said)))
        print(f"{self.steps[-1].seconds:8.1f} s  {name}: {self.steps[-1].said}", file=sys.stderr, flush=True)

    @contextmanager
    def serving(self, command: str) -> Iterator[None]:
        """A server as the page starts it, in a terminal of its own; it is asked to end at the end."""
        log = self.clone.parent / "server.log"
        line = f". {self.clone}/.venv/bin/activate; exec {command}"
        with log.open("wb") as sink:
            server = subprocess.Popen(
                ["bash", "-c", line], cwd=self.clone, env=self.environment, stdout=sink, stderr=subprocess.STDOUT
            )
        try:
            with self.timed("serve") as said:
                limit = time.monotonic() + START_S
                while "ready at http" not in log.read_text():
                    if server.poll() is not None or time.monotonic() > limit:
                        raise SystemExit(f"The server did not start:\n{log.read_text()}")
                    time.sleep(0.05)
                said.append("ready")
            yield
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.newcomer", description="A newcomer's first steps"
    )
    parser.add_argument("--keep", action="store_true", help="leave the folder behind")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="newcomer-"))
    try:
        steps = first_steps(Newcomer(folder, free_port()))
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    total = sum(step.seconds for step in steps)
    if options.json:
        print(json.dumps({"seconds": total, "steps": [vars(step) for step in steps]}, indent=2))
    else:
        print(f"{total:8.1f} s  in all")


def first_steps(newcomer: Newcomer) -> list[Step]:
    """The blocks of the quick start, in its order."""
    steps = Steps(*page_of(QUICK_START).blocks)
    copy_of_the_repository(newcomer.clone)
    with newcomer.timed("install") as said:
        newcomer.bash(steps.install.code, INSTALL_S)
        said.append("packages are there")
    with newcomer.serving(steps.serve.code.strip()):
        with newcomer.timed("first completion") as said:
            before = texts(newcomer.bash(steps.ask.code))
            said.append(f"{before}")
        (newcomer.clone / steps.teach.title).write_text(newcomer.here(steps.teach.code), encoding="utf-8")
        with newcomer.timed("push") as said:
            said.append("; ".join(newcomer.bash(steps.push.code).splitlines()))
        with newcomer.timed("changed completion") as said:
            after = texts(newcomer.bash(completion_of(steps.again)))
            said.append(f"{after}")
        if after == before:
            raise SystemExit(f"The completions are what they were: {after}.")
        with newcomer.timed("page") as said:
            said.append(shown(f"http://127.0.0.1:{newcomer.port}"))
    return newcomer.steps


def completion_of(block: Block) -> str:
    """The block without what it prints besides."""
    return block.code[: block.code.index("\nrollout-server")]


def texts(reply: str) -> list[str]:
    return [choice["text"] for choice in json.loads(reply)["choices"]]


def shown(url: str, patience_s: float = LOOK_S) -> str:
    """Which versions the page shows, and to whom; ends the process where it does not show both."""
    why = missing()
    found = seen(url, patience_s) if why is None else told(url)
    if not {"policy@1", "policy@2"} <= set(found):
        raise SystemExit(f"The page shows {found}, not both versions.")
    versions = ", ".join(found)
    return f"shows {versions}" if why is None else f"would show {versions}; nobody looked, for {why}"


def seen(url: str, patience_s: float) -> list[str]:
    """What a browser has on the page once its cards are there, or by the end of its patience."""
    cards = "return [...document.querySelectorAll('[data-version]')].map((card) => card.dataset.version)"
    end = time.monotonic() + patience_s
    with browser() as page:
        page.driver.get(url)
        while not (found := page.run(cards)) and time.monotonic() < end:
            time.sleep(0.05)
        return [str(version) for version in found if version != "base"]


def told(url: str) -> list[str]:
    """What the page would draw: its file comes, and so does a frame."""
    with urlopen(f"{url}/") as page:
        if "text/html" not in page.headers["content-type"]:
            raise SystemExit("There is no page at /.")
    with urlopen(f"{url}/page/state") as state:
        frame: dict[str, Any] = json.load(state)
    return [f"{policy['name']}@{version['version']}" for policy in frame["policies"] for version in policy["versions"]]


def copy_of_the_repository(clone: Path) -> None:
    """What git knows of, as it lies here."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, clone / name)


def free_port() -> int:
    """8000 where it is free."""
    with socket.socket() as tried:
        try:
            tried.bind(("127.0.0.1", PORT))
        except OSError:
            tried.bind(("127.0.0.1", 0))
        return int(tried.getsockname()[1])


if __name__ == "__main__":
    main()
