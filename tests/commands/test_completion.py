"""What a shell is told behind TAB, in the way in which bash asks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rollout_server.cli import app
from tests.support.live_server import Server, server_here
from trainer_client import RolloutClient


def asked(*words: str) -> dict[str, str]:
    """What bash sets before it runs the command."""
    typed = " ".join(("rollout-server", *words))
    return {"_ROLLOUT_SERVER_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(words))}


def offered(*words: str, **environment: str) -> list[str]:
    """For the last of the words, by the command in this process."""
    done = CliRunner().invoke(app, [], env=asked(*words) | environment, prog_name="rollout-server")
    assert done.exit_code == 0 and not done.stderr, done.output
    return done.stdout.split()


def offered_by_a_process(*words: str) -> list[str]:
    program = "import sys; sys.argv = ['rollout-server']; from rollout_server.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **asked(*words)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.split()


@pytest.fixture(scope="module")
def url(server: Server, adapter: Path) -> str:
    with RolloutClient(server.url) as client:
        client.push("offered", adapter)
    return server.url


def test_policies_of_the_server_that_is_asked(url: str) -> None:
    assert offered("generate", "--url", url, "--policy", "off") == ["offered", "offered@1"]
    assert "base" in offered("perplexity", "--url", url, "--policy", "b")


def test_names_and_their_versions(url: str) -> None:
    assert offered("weights", "activate", "--url", url, "off") == ["offered"]
    assert offered("weights", "activate", "--url", url, "offered", "1") == ["1"]
    assert offered("push", "--url", url, "--name", "off") == ["offered"]


def test_names_of_another_model(model: Path, adapter: Path) -> None:
    with (
        server_here(model, kv_memory="16MiB", also=(("judge", str(model)),)) as live,
        RolloutClient(live.url) as client,
    ):
        client.push("first", adapter)
        client.push("judge/helpful", adapter)
        assert offered("weights", "list", "--url", live.url, "--model", "judge", "h") == ["helpful"]
        assert offered("weights", "list", "--url", live.url, "f") == ["first"]
        assert offered("weights", "list", "--url", live.url, "--model", "judge", "f") == []


def test_the_address_of_the_environment(url: str) -> None:
    port = url.rpartition(":")[2]
    assert offered("weights", "list", "off", ROLLOUT_PORT=port, ROLLOUT_HOST="127.0.0.1") == ["offered"]


def test_without_a_server_only_the_base_is_offered_and_nothing_is_said() -> None:
    assert offered("generate", "--url", "http://127.0.0.1:9", "--policy", "b") == ["base"]
    assert offered("weights", "list", "--url", "nonsense", "a") == []


def test_values_of_options() -> None:
    assert offered("serve", "--page", "o") == offered_by_a_process("serve", "--page", "o") == ["on", "off"]
    assert offered("serve", "--prefer", "t") == ["throughput"]


def test_paths_are_left_to_the_shell(tmp_path: Path) -> None:
    assert offered("push", str(tmp_path)) == []
    assert offered("serve", "--model", str(tmp_path)) == []
