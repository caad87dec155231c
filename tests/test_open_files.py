"""Where few files may be open everything starts, and a limit that was higher is never taken down."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import httpx
import pytest

from rollout_server.open_files import OpenFiles
from tests.laws.grids import some_long
from tests.support.live_server import server_here

ROOT = Path(__file__).parent.parent
MODEL = str(files("rollout_server") / "demo" / "model")
SERVE = """
import sys
from rollout_server.cli import main
sys.argv = ["rollout-server", "serve", "--port", "0"]
main()
"""


def limited(soft: int, hard: int, *command: str) -> list[str]:
    """`command` of a process that may have so many files open."""
    allowed = OpenFiles.now().hard
    if allowed is not None and allowed < hard:
        pytest.skip(f"only {allowed} files may be open here")
    return ["sh", "-c", f'ulimit -Sn {soft} && ulimit -Hn {hard} && exec "$@"', "sh", *command]


def python(code: str, soft: int, hard: int) -> str:
    command = limited(soft, hard, sys.executable, "-c", code)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


IMPORTS = """
import resource
from rollout_server.open_files import import_mlx_lm
import_mlx_lm()
import mlx_lm.utils, inspect
assert "RLIMIT_NOFILE" in inspect.getsource(mlx_lm.utils), "it is mlx-lm's own code that ran"
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("before", "after"),
    some_long(
        [
            ((1024, 1024), "1024 1024"),
            ((256, 256), "256 256"),
            # What mlx-lm is after is done as far as it may be.
            ((256, 1500), "1500 1500"),
            ((256, 6000), "2048 6000"),
            ((6000, 6000), "6000 6000"),
        ],
        ((256, 1500), "1500 1500"),
    ),
)
def test_importing_mlx_lm_raises_the_limit_as_far_as_it_may_and_never_lowers_it(
    before: tuple[int, int], after: str
) -> None:
    assert python(IMPORTS, *before) == after


@pytest.mark.long
def test_other_threads_import_meanwhile() -> None:
    code = """
import importlib, resource, sys, threading
from rollout_server.open_files import import_mlx_lm
names = ["sqlite3", "xml.dom.minidom", "wave", "mailbox", "ftplib", "curses.ascii", "plistlib", "tarfile", "poplib"]
faults, own, before = [], resource.setrlimit, resource.getrlimit(resource.RLIMIT_NOFILE)
def others():
    try:
        for name in names:
            importlib.import_module(name)
    except ImportError as error:
        faults.append(error)
def ours():
    import_mlx_lm()
    sys.modules["mlx.core"].clear_streams()  # or MLX's worker of this thread can abort the process at its exit
threads = [threading.Thread(target=each) for each in (others, ours, ours)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
left = [finder for finder in sys.meta_path if "rollout_server" in type(finder).__module__]
whole = "mlx_lm.utils" in sys.modules and resource.getrlimit(resource.RLIMIT_NOFILE) == before
print("whole" if whole and not faults and not left and resource.setrlimit is own else (faults, left))
"""
    assert python(code, 2100, 2100) == "whole"


@contextmanager
def serving(soft: int, hard: int) -> Iterator[tuple[str, list[str]]]:
    command = limited(soft, hard, sys.executable, "-c", SERVE)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT) as process:
        try:
            log: list[str] = []
            for line in process.stdout or ():
                log.append(line)
                if ready := re.search(r"rollout-server is ready at (http\S+)", line):
                    yield ready[1], log
                    return
            raise AssertionError("".join(log))
        finally:
            process.kill()


@pytest.mark.long
@pytest.mark.parametrize("limit", [1024, 256])
def test_a_server_starts_and_says_what_it_cannot_do(limit: int) -> None:
    with serving(limit, limit) as (url, log):
        asked = {"policy": "base", "prompts": [{"text": "1+1="}], "sampling": {"max_tokens": 2}}
        assert httpx.post(f"{url}/v1/rollouts", json=asked, timeout=60).status_code == 200
    (said,) = [line for line in log if "files may be open" in line]
    assert f"at most {limit} files" in said and f"some {OpenFiles(limit, limit).connections} connections" in said


@pytest.mark.long
def test_the_commands_that_load_a_model_themselves_work(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("1+1=2\n")
    for words in (["generate", "1+1=", "--max-tokens", "2"], ["perplexity", str(tmp_path / "text")]):
        command = limited(256, 256, sys.executable, "-m", "rollout_server", *words, "--model", MODEL)
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)
        assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_the_trainers_work() -> None:
    launch = limited(256, 256, sys.executable, "-m", "rollout_server.demo.launch", "--help")
    done = subprocess.run(launch, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0 and "--url" in done.stdout, done.stderr
    example = (ROOT / "examples" / "grpo_loop.py").read_text(encoding="utf-8")
    with server_here(None) as server:
        code = example.replace("http://127.0.0.1:8000", server.url).replace("range(30)", "range(1)")
        assert python(code, 256, 256).startswith("step")


@pytest.mark.parametrize("limit", [16, 28, 64, 256, 1024, 4096, 65536, 2**20])
def test_there_is_room_beyond_what_connections_may_have(limit: int) -> None:
    allowed = OpenFiles(limit, limit)
    assert allowed.last is not None and allowed.crowded is not None and allowed.connections is not None
    assert allowed.connections < allowed.crowded <= allowed.last < limit - 1
    assert limit < 1024 or allowed.connections > 0.9 * limit
    assert OpenFiles(None, None).last is OpenFiles(None, None).crowded is OpenFiles(None, None).connections is None
