"""Container files, units and the issue form: what they copy, run, set and ask for exists."""

from __future__ import annotations

import json
import plistlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from rollout_server.cli import app
from rollout_server.config import ServerConfig
from rollout_server.fleet.wire import AGAIN
from tests.laws.grids import some_long
from tests.support.live_server import server_here

ROOT = Path(__file__).parents[2]
CONTAINERS = sorted((ROOT / "packaging" / "containers").glob("*.Dockerfile"))
UNIT = ROOT / "packaging" / "systemd" / "rollout-server.service"
PLIST = ROOT / "packaging" / "launchd" / "local.rollout-server.plist"
PROGRAMS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def instructions(path: Path) -> list[tuple[str, str]]:
    """(Instruction, its text) of a container file, continued lines joined."""
    lines = (line for line in path.read_text().splitlines() if not line.startswith("#"))
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name, text) for name, _, text in (line.partition(" ") for line in joined.splitlines() if line)]


def of(path: Path, name: str) -> list[str]:
    return [text for each, text in instructions(path) if each == name]


def is_a_command(program: str, *words: str) -> bool:
    return Path(program).name in PROGRAMS and CliRunner().invoke(app, [*words, "--help"]).exit_code == 0


def unknown_settings(names: Iterator[str] | list[str]) -> list[str]:
    fields = {f"ROLLOUT_{name.upper()}" for name in ServerConfig.model_fields}
    return [name for name in names if name.startswith("ROLLOUT_") and name not in fields]


@pytest.mark.parametrize("path", CONTAINERS, ids=lambda path: path.stem)
def test_a_container_runs_what_there_is(path: Path) -> None:
    for copied in of(path, "COPY"):
        *sources, _ = [word for word in shlex.split(copied) if not word.startswith("--")]
        if "--from" not in copied:
            assert all((ROOT / source).exists() for source in sources), copied
    assert all(re.fullmatch(r"\S+:[\w.-]+(?: AS \w+)?", base) and ":latest" not in base for base in of(path, "FROM"))
    assert int(of(path, "USER")[-1]) > 0, "nobody is root inside"
    (entry,), (command,) = of(path, "ENTRYPOINT"), of(path, "CMD")
    assert is_a_command(*json.loads(entry), *json.loads(command))
    names = re.findall(r"(\w+)=", " ".join(of(path, "ENV")))
    assert "ROLLOUT_HOST" in names and not unknown_settings(names)
    said = re.findall(r"^#\s+docker build --file (\S+)", path.read_text(), flags=re.MULTILINE)
    assert said == [path.relative_to(ROOT).as_posix()]


@pytest.mark.parametrize("path", CONTAINERS, ids=lambda path: path.stem)
def test_a_container_can_be_a_replica_as_its_head_says(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = re.sub(r"\\\n#\s*", "", path.read_text())
    (said,) = re.findall(r"docker run (.* serve --join .*)", head)
    assert "--no-healthcheck" in said, "nothing answers at its port"
    for name, value in re.findall(r"(ROLLOUT_\w+)=(\S*)", " ".join(of(path, "ENV")) + " " + said):
        monkeypatch.setenv(name, value)
    assert ServerConfig(join="http://studio:8000").state_dir is None


def test_there_is_a_container_for_each_kind_of_machine() -> None:
    assert [path.stem for path in CONTAINERS] == ["cpu", "cuda"]


@pytest.mark.parametrize("path", some_long(CONTAINERS, CONTAINERS[0]), ids=lambda path: path.stem)
def test_the_health_of_a_container_is_that_of_ready(path: Path) -> None:
    """As docker runs it, on another port: well while a server is ready there, ill where none is."""
    (check,) = of(path, "HEALTHCHECK")
    program, *words = json.loads(check.partition("CMD ")[2])
    assert program == "python" and words[1].count("127.0.0.1:8000/ready") == 1
    with server_here(None) as live:
        command = [sys.executable, words[0], words[1].replace("http://127.0.0.1:8000", live.url)]
        assert subprocess.run(command, timeout=60).returncode == 0
    assert subprocess.run(command, timeout=60, stderr=subprocess.DEVNULL).returncode != 0


@pytest.mark.skipif(
    not shutil.which("hadolint", path=Path(sys.executable).parent), reason="`make containers` brings it"
)
@pytest.mark.parametrize("path", CONTAINERS, ids=lambda path: path.stem)
def test_the_linter_of_container_files_is_content(path: Path) -> None:
    linter = str(Path(sys.executable).parent / "hadolint")
    done = subprocess.run([linter, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_unit_of_systemd_runs_what_there_is() -> None:
    settings = [line.partition("=") for line in UNIT.read_text().splitlines() if "=" in line and line[0] != "#"]
    (started,) = (value for name, _, value in settings if name == "ExecStart")
    assert is_a_command(*started.split())
    (never,) = (value for name, _, value in settings if name == "RestartPreventExitStatus")
    assert never == "1" and str(AGAIN) != never and ("Restart", "=", "on-failure") in settings
    assert not unknown_settings([value.partition("=")[0] for name, _, value in settings if name == "Environment"])


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd here")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    """It wants the program to be there."""
    program = "/opt/rollout-server/bin/rollout-server"
    unit = UNIT.read_text().replace(f"ExecStart={program}", f"ExecStart={sys.executable}")
    assert program not in unit.split("[Service]")[1]
    (tmp_path / UNIT.name).write_text(unit)
    done = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / UNIT.name)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and UNIT.name not in done.stderr, done.stderr


def test_the_agent_of_launchd_runs_what_there_is() -> None:
    agent = plistlib.loads(PLIST.read_bytes())
    assert f"{agent['Label']}.plist" == PLIST.name
    assert is_a_command(*agent["ProgramArguments"])
    assert agent["KeepAlive"] == {"SuccessfulExit": False}, "started again, also by a status that is no crash"
    (own,) = re.findall(r'sudo install -d -o "\$USER" (\S+)', PLIST.read_text())
    paths = [*agent["ProgramArguments"][:1], agent["StandardOutPath"], agent["StandardErrorPath"]]
    assert all(path.startswith(f"{own}/") for path in paths), "in a folder that the user may write"
    assert not unknown_settings(list(agent["EnvironmentVariables"]))


def test_an_issue_asks_for_what_the_doctor_says() -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    (asked,) = (part for part in form["body"] if "doctor" in part["attributes"]["label"])
    assert asked["validations"]["required"]
    (command,) = re.findall(r"`(.+)`", asked["attributes"]["label"])
    assert is_a_command(*shlex.split(command))
