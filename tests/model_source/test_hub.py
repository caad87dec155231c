"""Models of the Hub, by way of the command line, against a stand-in on loopback."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import pty
import random
import re
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from rollout_server.errors import InvalidField
from rollout_server.model_source.hub import explained, progress_of
from rollout_server.model_source.model_files import resolve_model
from tests.support.hub_stand_in import HubStandIn, Repository, files_of, hub_stand_in
from tests.support.live_server import live_server

OPEN, GATED, PRIVATE, PICKLED, LARGE = "org/tiny", "org/gated", "org/private", "org/pickled", "org/large"
SEVERAL = """
import json, sys
from typer.testing import CliRunner
from rollout_server.cli import app
for arguments, token in json.loads(sys.argv[1]):
    done = CliRunner().invoke(app, arguments, env={"HF_TOKEN": token})
    print(json.dumps([done.exit_code, done.stdout, done.stderr]))
"""
"""Runs commands of one process: huggingface_hub reads all but the token when it is imported."""


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """The embedded model, and beside it what must never be fetched."""
    directory, _ = resolve_model(None)
    strange = {
        "modeling_tiny.py": b"raise SystemExit('code of a model was run')",
        "pytorch_model.bin": b"not fetched",
        "consolidated.safetensors": b"not fetched",
        "original/model.safetensors": b"not fetched",
        "README.md": b"not fetched",
    }
    return files_of(directory) | strange


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[HubStandIn]:
    pickled = {name: content for name, content in files.items() if name != "model.safetensors"}
    repositories = {
        OPEN: Repository(dict(files), revisions={"main": "a" * 40, "v1": "b" * 40}),
        GATED: Repository(dict(files), gated=True),
        PRIVATE: Repository(dict(files), private=True),
        PICKLED: Repository(pickled),
        # The library reads 10 MiB at a time, and goes on after what it has written.
        LARGE: Repository(
            {"config.json": b"{}", "model.safetensors": random.Random(0).randbytes(22_000_000)},
            breaks={"model.safetensors": 15_000_000},
        ),
    }
    with hub_stand_in(HubStandIn(repositories, tokens={"outsider", "insider"}, admitted={"insider"})) as stand_in:
        yield stand_in


def environment(hub: HubStandIn, home: Path, **more: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("ROLLOUT_", "HF_"))}
    local = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1,localhost", "HF_HUB_DISABLE_XET": "1"}
    return {**inherited, **local, "HF_HUB_DISABLE_TELEMETRY": "1", **more}


def run(code: str, given: list[tuple[list[str], str | None]], variables: dict[str, str]) -> list[tuple[int, str, str]]:
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(given)], capture_output=True, text=True, env=variables, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.mark.long
def test_a_model_is_fetched_once_and_served_by_its_id(hub: HubStandIn, tmp_path: Path) -> None:
    variables = environment(hub, tmp_path)
    with live_server(None, "--model", OPEN, "--kv-memory", "64MiB", environment=variables) as server:
        models = httpx.get(f"{server.url}/v1/models", trust_env=False).json()["data"]
        assert [card["id"] for card in models] == ["base", OPEN]
        reply = httpx.post(
            f"{server.url}/v1/completions", json={"model": OPEN, "prompt": "1+1=", "max_tokens": 4}, trust_env=False
        )
        assert reply.status_code == 200 and reply.json()["model"] == OPEN
    fetched = {name for name in hub.got() if name}
    assert "model.safetensors" in fetched and not fetched & {"README.md", "modeling_tiny.py", "pytorch_model.bin"}
    assert "consolidated.safetensors" not in fetched and hub.got().count("model.safetensors") == 1

    before = len(hub.got())
    offline = variables | {"HF_HUB_OFFLINE": "1"}
    asked = [["download", OPEN, "--json"], ["download", OPEN, "--revision", "v1"]]
    asked += [["serve", "--port", "0", "--model", GATED, "--revision", "v1"]]
    here, elsewhere, absent = run(SEVERAL, [(arguments, None) for arguments in asked], offline)
    assert here[0] == 0, here
    said = json.loads(here[1])
    assert (said["model"], said["commit"]) == (OPEN, "a" * 40) and (Path(said["path"]) / "config.json").is_file()
    assert said["bytes"] == sum(path.stat().st_size for path in Path(said["path"]).iterdir())
    for refused, model in ((elsewhere, OPEN), (absent, GATED)):
        assert refused[0] == 1 and refused[2].splitlines()[-1].startswith(f"rollout-server: {model} is not")
        assert f"`rollout-server download {model} --revision v1` without HF_HUB_OFFLINE" in refused[2]
    assert len(hub.got()) == before


@pytest.mark.long
def test_a_broken_connection_is_gone_on_with(hub: HubStandIn, tmp_path: Path) -> None:
    """And on a terminal a bar says how far it is."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    shown: list[bytes] = []

    def read() -> None:
        with suppress(OSError):  # what the other end's closing looks like
            while part := os.read(master, 4096):
                shown.append(part)

    reading = threading.Thread(target=read)
    reading.start()
    command, variables = [sys.executable, "-m", "rollout_server", "download", LARGE], environment(hub, tmp_path)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=slave, text=True, env=variables) as done:
        os.close(slave)
        out, _ = done.communicate(timeout=100)
    reading.join()
    os.close(master)
    terminal = b"".join(shown).decode()
    assert done.returncode == 0, terminal
    ranges = [ask.range for ask in hub.asked if ask.method == "GET" and ask.path.endswith("model.safetensors")]
    assert ranges[0] is None and ranges[1:] == [f"bytes={10 * 2**20}-"]
    assert (Path(out.strip()) / "model.safetensors").read_bytes() == hub.repositories[LARGE].files["model.safetensors"]
    assert re.search(rf"\r{LARGE}: 100%\|█+\| 22\.0MB / 22\.0MB", terminal), terminal


def test_every_refusal_says_what_to_do(hub: HubStandIn, tmp_path: Path) -> None:
    cases: list[tuple[list[str], str | None, str]] = [
        ([GATED], None, f"accept its terms at {hub.url}/{GATED}, then set HF_TOKEN"),
        ([GATED], "outsider", f"ask for it at {hub.url}/{GATED}"),
        ([GATED], "bad", "set HF_TOKEN to a valid one"),
        ([PRIVATE], None, "it is private and needs HF_TOKEN"),
        (["org/none"], "insider", "has no such model, or the token in use may not read it"),
        ([OPEN, "--revision", "v9"], None, "has no revision 'v9': --revision takes a branch, a tag or a commit"),
        ([PICKLED], None, "holds no weights in model*.safetensors"),
        (["a b"], None, "no Hub id either"),
    ]
    given = [(["download", *arguments], token) for arguments, token, _ in cases]
    given += [(["download", GATED], "insider"), (["download", PRIVATE, "--revision", "main"], "outsider")]
    *refused, gated, private = run(SEVERAL, given, environment(hub, tmp_path))
    for (status, out, error), (_, _, said) in zip(refused, cases, strict=True):
        assert status == 1 and not out and said in error.splitlines()[-1], error
    assert gated[0] == private[0] == 0, (gated, private)
    assert {ask.token for ask in hub.asked if ask.host == "localhost"} == {None}, "the token went to another host"

    away = environment(hub, tmp_path / "empty", HF_ENDPOINT="http://127.0.0.1:9")
    ((status, _, error),) = run(SEVERAL, [(["download", OPEN], None)], away)
    assert status == 1 and error.startswith("rollout-server: http://127.0.0.1:9 cannot be reached"), error


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    def refusal(model: Path | str, revision: str | None = None) -> str:
        with pytest.raises(InvalidField) as refused:
            resolve_model(str(model), revision)
        return refused.value.message

    assert refusal(tmp_path / "nowhere").startswith(f"There is no directory {tmp_path / 'nowhere'}. Give ")
    assert "holds no config.json" in refusal(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "is an adapter and no model" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "model*.safetensors, only pytorch_model.bin. Pickles" in refusal(tmp_path)
    assert "is a file" in refusal(tmp_path / "config.json")
    assert "leave out --revision" in refusal(tmp_path, "v1")


def test_what_is_not_foreseen_is_told_in_a_sentence() -> None:
    full = explained(OSError(28, "No space left on device"), OPEN, None)
    assert full.message.startswith(f"{OPEN} could not be fetched from ") and "No space left on device" in full.message


def test_progress_is_a_line_now_and_then(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollout_server.model_source.hub.LINE_S", 0.0)
    with caplog.at_level(logging.INFO, logger="rollout_server.hub"):
        progress = progress_of(OPEN, made := [])
        progress(total=3, desc="Fetching 3 files").update(3)
        bar = progress(total=4_000_000, unit="B", unit_scale=True, name="huggingface_hub.snapshot_download")
        bar.update(1_000_000)
        bar.refresh()
        bar.close()
    assert made[-1] is bar and capsys.readouterr().err == ""
    assert {record.getMessage() for record in caplog.records} == {f"{OPEN}: 1.00MB of 4.00MB"}
