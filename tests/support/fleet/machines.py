"""A controller and replicas that join it, as processes of their own: what several machines are, on one."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import environ
from pathlib import Path

from tests.support.live_server import PATIENCE_S, LiveServer, until

KEY = "a-key-of-thirty-two-characters--"


@dataclass
class Machine(LiveServer):
    """One process; `url` is empty for a replica."""

    def said(self, pattern: str) -> re.Match[str] | None:
        return re.search(pattern, "".join(self.log))

    def wait_for(self, pattern: str, within_s: float = PATIENCE_S) -> re.Match[str]:
        """Waits until it has said this. Raises `AssertionError` with its log where it does not."""
        try:
            until(lambda: self.said(pattern) or self.process.poll() is not None, within_s)
        except AssertionError as error:
            raise AssertionError(f"{pattern!r} was not said:\n{''.join(self.log)}") from error
        found = self.said(pattern)
        if found is None:
            raise AssertionError(f"{pattern!r} was not said:\n{''.join(self.log)}")
        return found


@contextmanager
def machine(*arguments: str, key: str | None = KEY, within: Sequence[str] = ()) -> Iterator[Machine]:
    """`rollout-server serve` with these arguments, until the context ends; `within` are words before the command."""
    given = {"ROLLOUT_REPLICA_TIMEOUT_S"}
    inherited = {name: value for name, value in environ.items() if name in given or not name.startswith("ROLLOUT_")}
    process = subprocess.Popen(
        [*within, sys.executable, "-m", "rollout_server", "serve", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parents[3],
        env=inherited | {"PYTHONUNBUFFERED": "1"} | ({"ROLLOUT_FLEET_KEY": key} if key else {}),
    )
    made = Machine("", process)

    def read() -> None:
        for line in process.stdout or ():
            made.log.append(line)

    threading.Thread(target=read, daemon=True).start()
    try:
        yield made
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@contextmanager
def controller(model: Path, state: Path, *options: str, port: int = 0, key: str | None = KEY) -> Iterator[Machine]:
    """`serve --fleet`; it takes replicas when the context begins."""
    arguments = ("--fleet", "--state-dir", str(state), "--model", str(model), "--port", str(port), *options)
    with machine(*arguments, key=key) as made:
        made.url = made.wait_for(r"takes replicas at (http://\S+):")[1]
        yield made


@contextmanager
def replica(
    model: Path, url: str, *options: str, key: str | None = KEY, within: Sequence[str] = ()
) -> Iterator[Machine]:
    """`serve --join`, which may be loading yet when the context begins."""
    with machine(
        "--join", url, "--model", str(model), "--kv-memory", "16MiB", *options, key=key, within=within
    ) as made:
        yield made
