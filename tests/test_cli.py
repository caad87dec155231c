"""The command line, from outside: a real server process, and the commands that talk to it."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from safetensors.numpy import save_file
from typer.testing import CliRunner, Result

from rollout_server import __version__, config
from rollout_server.cli import app
from rollout_server.commands.serve import greet, key_to_send

KEY = "test-admin-key"


def run(*arguments: str, **environment: str | None) -> Result:
    return CliRunner().invoke(app, [*arguments], env={"ROLLOUT_ADMIN_KEY": None, "COLUMNS": "200", **environment})


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server of the embedded model that wants a key for everything."""
    command = [sys.executable, "-m", "rollout_server", "serve", "--port", "0", "--kv-memory", "64MiB"]
    environment = os.environ | {"ROLLOUT_ADMIN_KEY": KEY}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        try:
            ready = re.fullmatch(r"rollout-server is ready at (http://127\.0\.0\.1:\d+)\n", server.stdout.readline())
            assert ready, "the server ended before it was ready"
            yield ready[1]
        finally:
            server.terminate()
            assert server.wait(timeout=30) == 0


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A rank-2 LoRA of one projection of the embedded model, as PEFT saves it."""
    model = json.loads((files("rollout_server") / "demo" / "model" / "config.json").read_text())
    hidden, out = model["hidden_size"], model["num_attention_heads"] * model["head_dim"]
    noise = np.random.default_rng(0).normal(size=(2, hidden)).astype(np.float32)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{prefix}.lora_A.weight": noise, f"{prefix}.lora_B.weight": np.ones((out, 2), np.float32)},
        tmp_path / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "layers_to_transform": [0]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path


def test_push_list_activate(url: str, adapter: Path) -> None:
    first = run("push", str(adapter), "--name", "cli", "--label", "one", "--url", url, "--json", ROLLOUT_ADMIN_KEY=KEY)
    assert first.exit_code == 0, first.output
    pushed = json.loads(first.stdout)
    assert (pushed["name"], pushed["version"], pushed["live"], pushed["label"]) == ("cli", 1, True, "one")

    again = run("push", str(adapter), "--name", "cli", "--url", url, ROLLOUT_ADMIN_KEY=KEY)
    assert again.exit_code == 0, again.output
    assert again.stdout == f"cli@1 unchanged: {pushed['digest']}\n"

    moved = run("weights", "activate", "cli", "1", "--url", url, ROLLOUT_ADMIN_KEY=KEY)
    assert moved.exit_code == 0 and moved.stdout == "cli@1 is live\n", moved.output

    table = run("weights", "list", "--url", url, ROLLOUT_ADMIN_KEY=KEY)
    assert re.search(r"cli@1 +live +one +lora .*" + pushed["digest"][:19], table.stdout), table.output

    listed = run("weights", "list", "cli", "--url", url, "--json", ROLLOUT_ADMIN_KEY=KEY)
    (policy,) = json.loads(listed.stdout)["policies"]
    assert policy["live"] == 1 and policy["versions"][0]["bytes"] > 0


def test_what_the_server_refuses_is_one_sentence(url: str, adapter: Path) -> None:
    for arguments, environment, said in (
        (["push", str(adapter), "--name", "cli"], {}, "key"),
        (["weights", "activate", "cli", "999"], {"ROLLOUT_ADMIN_KEY": KEY}, "999"),
        (["weights", "list", "nobody"], {"ROLLOUT_ADMIN_KEY": KEY}, "nobody"),
    ):
        refused = run(*arguments, "--url", url, **environment)
        assert refused.exit_code == 1 and refused.stdout == "", refused.output
        assert said in refused.stderr and refused.stderr.count("\n") == 1, refused.stderr


def test_no_server_is_one_sentence() -> None:
    refused = run("weights", "list", "--url", "http://127.0.0.1:9")
    assert refused.exit_code == 1
    assert refused.stderr.startswith("rollout-server: No rollout server answers at http://127.0.0.1:9 ")


def test_what_is_configured_for_a_server_elsewhere_does_not_stop_a_client(url: str) -> None:
    elsewhere = {"ROLLOUT_HOST": "gpu-box", "ROLLOUT_PORT": "0", "ROLLOUT_KV_MEMORY": "lots"}
    listed = run("weights", "list", "--url", url, ROLLOUT_ADMIN_KEY=KEY, **elsewhere)
    assert listed.exit_code == 0, listed.output
    refused = run("weights", "list", ROLLOUT_PORT="9", ROLLOUT_HOST="::1")
    assert refused.exit_code == 1 and "No rollout server answers at http://[::1]:9 " in refused.stderr
    refused = run("weights", "list", ROLLOUT_PORT="0")
    assert refused.exit_code == 1 and "ROLLOUT_PORT" in refused.stderr


def test_bad_options_are_all_named_and_nothing_starts() -> None:
    refused = run("serve", "--port", "99999", "--kv-memory", "lots", "--adapter", "nowhere")
    assert refused.exit_code == 1
    for option in ("--port (ROLLOUT_PORT): ", "--kv-memory (ROLLOUT_KV_MEMORY): ", "--adapter (ROLLOUT_ADAPTERS): "):
        assert option in refused.stderr


def test_what_has_no_option_is_named_by_its_variable_alone() -> None:
    wrong = {
        "ROLLOUT_FLEET_KEY": "short",
        "ROLLOUT_API_KEY": "two words",
        "ROLLOUT_REPLICA_TIMEOUT_S": "0",
        "ROLLOUT_SHUTDOWN_S": "soon",
        "ROLLOUT_MAX_QUEUE": "0",
        "ROLLOUT_PAGE": "maybe",
    }
    said = run("serve", "--port", "70000", **wrong).stderr.removeprefix("rollout-server: ").strip().split("; ")
    assert sorted(fault for fault in said if "KEY" not in fault) == [
        "--max-queue (ROLLOUT_MAX_QUEUE): '0' is not 1 or more",
        "--page (ROLLOUT_PAGE): 'maybe' is not 'on' or 'off'",
        "--port (ROLLOUT_PORT): 70000 is not 65535 or less",
        "ROLLOUT_REPLICA_TIMEOUT_S: '0' is not above 0",
        "ROLLOUT_SHUTDOWN_S: 'soon' is not a number",
    ]
    assert {fault.partition(":")[0] for fault in said if "KEY" in fault} == {"ROLLOUT_API_KEY", "ROLLOUT_FLEET_KEY"}
    elsewhere = run("weights", "list", ROLLOUT_PORT="0").stderr
    assert elsewhere == "rollout-server: ROLLOUT_PORT: '0' is not 1 or more\n", "weights has no --port"


def test_lists_come_from_the_environment_where_their_options_are_not_given() -> None:
    wrong = {
        "ROLLOUT_ADAPTERS": "nowhere",
        "ROLLOUT_ALSO": "nothing",
        "ROLLOUT_ALLOW_HOST": "http://proxy",
        "ROLLOUT_ALLOW_IMAGE_HOST": "http://pictures",
    }
    refused = run("serve", "--port", "0", **wrong)
    assert refused.exit_code == 1
    assert all(f"({name}): " in refused.stderr for name in wrong), refused.stderr


def test_without_keys_only_loopback() -> None:
    refused = run("serve", "--host", "0.0.0.0")
    assert refused.exit_code == 1
    assert "ROLLOUT_API_KEY" in refused.stderr and "--insecure" in refused.stderr


def test_a_model_that_is_not_there_ends_with_a_sentence(tmp_path: Path) -> None:
    refused = run("serve", "--port", "0", "--model", str(tmp_path))
    assert refused.exit_code == 1
    assert "config.json" in refused.stderr and "Traceback" not in refused.output


def test_help_names_the_defaults_of_the_configuration() -> None:
    text = " ".join(run("serve", "--help").stdout.replace("│", " ").split())
    sizes = {"2GiB": 2 * config.GIB, "64MiB": 64 * config.MIB, "20MiB": 20 * config.MIB}
    sizes["256MiB"] = 256 * config.MIB
    named = re.findall(r"--([a-z-]+) \S+ [^-]*? Default: (\S+)\.", text)
    assert len(named) >= 9, text
    for option, default in named:
        value = config.ServerConfig.model_fields[option.replace("-", "_")].default
        assert sizes.get(default, default) in (value, str(value)), option


def test_version_and_commands() -> None:
    assert run("--version").stdout == f"rollout-server {__version__}\n"
    listed = run("--help").stdout
    for command in ("serve", "demo", "push", "weights", "download", "generate", "top", "bench", "doctor"):
        assert f" {command} " in listed


def test_every_command_but_serve_prints_json_where_it_is_asked_to() -> None:
    def without(command: Any, name: str) -> list[str]:
        inner = getattr(command, "commands", {})
        options = [option for parameter in command.params for option in parameter.opts]
        found = [line for own, each in inner.items() for line in without(each, f"{name} {own}".strip())]
        return found if inner or "--json" in options else [name]

    assert without(typer.main.get_command(app), "") == ["serve"]


def test_help_and_push_start_without_mlx() -> None:
    code = "import sys, rollout_server.cli, trainer_client; print([m for m in sys.modules if m.startswith('mlx')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


def test_what_serve_greets_with_can_be_typed(capsys: pytest.CaptureFixture[str]) -> None:
    """Options are read before help is shown: one that does not exist would be refused."""
    greet("http://127.0.0.1:8000", "generate", page=True, key=None)
    ready, page, *commands, curl = capsys.readouterr().out.splitlines()
    assert ready == "rollout-server is ready at http://127.0.0.1:8000"
    assert page.split() == ["page", "http://127.0.0.1:8000/"]
    assert [line.split()[0] for line in commands] == ["generate", "push"]
    for line in commands:
        program, *arguments = shlex.split(line)[1:]
        assert program == "rollout-server" and run(*arguments, "--help").exit_code == 0, line
    greet("http://127.0.0.1:8000", "generate", page=False, key=None)
    assert capsys.readouterr().out.splitlines() == [ready, *commands, curl]


def test_the_curl_that_serve_greets_with_samples(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As a shell runs it, which puts the key in where keys are set."""
    greet(url, "generate", page=True, key="ROLLOUT_API_KEY")
    curl = capsys.readouterr().out.splitlines()[-1].split(maxsplit=1)[1]
    for key, answered in ((KEY, '"text"'), ("another", '"unauthorized"')):
        done = subprocess.run(
            ["sh", "-c", f"{curl} --silent"],
            env={**os.environ, "ROLLOUT_API_KEY": key},
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert answered in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("keys", "sent"),
    [
        ({}, None),
        ({"api_key": "a"}, "ROLLOUT_API_KEY"),
        ({"api_key": "a", "admin_key": "b"}, "ROLLOUT_API_KEY"),
        ({"admin_key": "b"}, "ROLLOUT_ADMIN_KEY"),
    ],
)
def test_serve_greets_with_a_key_that_it_has(keys: dict[str, str], sent: str | None) -> None:
    """With an administrator's key alone, that one is asked for inference too."""
    assert key_to_send(config.ServerConfig(**keys)) == sent


def test_a_shell_can_complete_the_commands() -> None:
    asked = {"_ROLLOUT_SERVER_COMPLETE": "complete_bash", "COMP_WORDS": "rollout-server d", "COMP_CWORD": "1"}
    program = "import sys; sys.argv = ['rollout-server']; from rollout_server.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **asked}, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["demo", "download", "doctor"], done.stderr
