"""`rollout-server demo`: a real server in one process, a GRPO trainer in a second one, HTTP between them."""

from __future__ import annotations

import json
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import httpx
from rich.console import Console
from rich.table import Table

from rollout_server.config import ServerConfig

START_S = 120.0
"""Longest wait for the server to be ready."""
STOP_S = 15.0
"""Longest wait for a process that was asked to end."""
LOG_LINES = 20
"""How much of a log is shown in an error."""


class DemoFailed(RuntimeError):
    """One of the demo's two processes failed."""


def model_directory() -> Path:
    """The embedded model: a directory that mlx-lm and transformers load."""
    return Path(__file__).parent / "model"


def run_demo(output: Path, steps: int | None, seed: int, json_output: bool) -> dict[str, Any]:
    """Runs the demo and returns the content of result.json, `seconds` being the whole run's. Its files are under
    `output`. On stdout it shows progress and a table; with `json_output` only the result, as one object.

    Raises `DemoFailed` if the server or the trainer fails."""
    started = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    arguments = ["--model", str(model_directory()), "--output", str(output), "--seed", str(seed)]
    if steps is not None:
        arguments += ["--steps", str(steps)]
    with ending_in_order(), serving(output / "server.log") as url:
        run_trainer(["--url", url, *arguments], stdout=sys.stderr if json_output else None)
    path = output / "result.json"
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    result["seconds"] = time.perf_counter() - started
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if json_output:
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        show(result, output)
    return result


@contextmanager
def serving(
    log: Path,
    options: Sequence[str] = (),
    *,
    unset: Iterable[str] = tuple(ServerConfig.model_fields),
    start_s: float = START_S,
) -> Iterator[str]:
    """The address of a server that is ready, of the embedded model unless `options` name another; its log goes to the
    file `log`. It is stopped at the end, whatever happens. `unset` are the settings that it does not take from the
    environment, `start_s` is how long it may take to be ready."""
    port = free_port()
    # The demo's server is the same everywhere: what the user has set for their own servers is taken away from it.
    clean = [part for name in unset for part in ("-u", f"ROLLOUT_{name.upper()}")]
    command = ["env", *clean, sys.executable, "-m", "rollout_server", "serve"]
    command += ["--host", "127.0.0.1", "--port", str(port), *options]
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as sink:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT)
        try:
            wait_ready(server, url, log, start_s)
            yield url
        finally:
            stop(server)


@contextmanager
def ending_in_order() -> Iterator[None]:
    """Makes SIGTERM leave by way of the `finally`s, so that a demo that is told to stop takes its processes along."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what signals do
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_ready(server: subprocess.Popen[bytes], url: str, log: Path, start_s: float = START_S) -> None:
    """Returns once `/ready` answers 200. Raises `DemoFailed` if the server ends or takes longer than `start_s`."""
    deadline = time.monotonic() + start_s
    answer = "never asked"
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise DemoFailed(f"The server ended with status {server.returncode}; the end of {log}:\n{tail(log)}")
        try:
            reply = httpx.get(f"{url}/ready", timeout=5.0, trust_env=False)
            if reply.status_code == 200:
                return
            answer = reply.text
        except httpx.TransportError as error:
            answer = str(error)
        time.sleep(0.25)
    raise DemoFailed(f"The server is not ready after {start_s:.0f} s ({answer}); the end of {log}:\n{tail(log)}")


def run_trainer(arguments: Sequence[str], *, stdout: IO[str] | None = None) -> None:
    """Runs the trainer process to its end. Raises `DemoFailed` if it fails; its own words are on stderr by then."""
    command = [sys.executable, "-m", "rollout_server.demo.launch", *arguments]
    trainer = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout)
    try:
        status = trainer.wait()
    finally:
        stop(trainer)
    if status != 0:
        raise DemoFailed(f"The trainer ended with status {status}; what it said is above.")


def stop(process: subprocess.Popen[bytes], patience_s: float = STOP_S) -> None:
    """Ends a process that may have ended already: asks first, then insists."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-LOG_LINES:]) or "(empty)"


def show(result: dict[str, Any], output: Path) -> None:
    """The short table at the end."""
    table = Table(title=f"GRPO, {result['steps']} steps, {result['seconds']:.0f} s", title_justify="left")
    table.add_column(f"greedy on {result['problems']} held-out problems")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    lenient = result["lenient_accuracy"]
    table.add_row("right, in the rewarded style", f"{result['base_accuracy']:.3f}", f"{result['final_accuracy']:.3f}")
    table.add_row("right, in any style", f"{lenient['before']:.3f}", f"{lenient['after']:.3f}")
    console = Console()
    console.print(table)
    console.print(
        f"largest gap between trainer and server: {result['max_abs_logprob_gap']:.1e} nats over "
        f"{result['sampled_tokens']} tokens\npush {result['push_ms_p50']:.0f} ms (p95 {result['push_ms_p95']:.0f}), "
        f"{result['tokens_per_s']:.0f} tokens/s, final version {result['final_version']}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    console.print("\n".join(what_next(output)), highlight=False, markup=False, soft_wrap=True)


def what_next(output: Path) -> Iterator[str]:
    """Where the plot is, and what to do with the adapter that was trained."""
    plot, adapter = (output / "reward.png").resolve(), (output / "adapter").resolve()
    if plot.is_file():
        yield f"reward over the steps: {plot.as_uri()}"
    yield f"everything else: {plot.parent}"
    yield "next:"
    yield f"  serve   rollout-server serve --adapter policy={shlex.quote(str(adapter))}"
    yield '  sample  rollout-server generate "12+13=" --policy policy --max-tokens 16'
    yield "  write a loop of your own: examples/grpo_loop.py in the repository is this one in a page"
