"""What is handed on: a wheel and a source archive of one version, and the wheel that the archive makes by itself."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from rollout_server import __version__

ROOT = Path(__file__).parents[2]
PACKAGES = ("rollout_server", "adapters", "trainer_client")
NAME = f"rollout_server-{__version__}"
INFO = f"{NAME}.dist-info"


def build(source: Path, into: Path, *options: str) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(into), *options]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `make wheel` fills."""
    into = tmp_path_factory.mktemp("dist")
    build(ROOT, into)
    return into


@pytest.fixture(scope="module")
def unpacked(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive, elsewhere: nothing of this tree is near."""
    place = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(built / f"{NAME}.tar.gz") as archive:
        archive.extractall(place, filter="data")
    return place / NAME


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def files(*packages: str) -> set[str]:
    found = (path for package in packages for path in (ROOT / package).rglob("*") if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in found if "__pycache__" not in path.parts}


def test_both_are_of_the_one_version(built: Path) -> None:
    assert {path.name for path in built.iterdir()} == {f"{NAME}-py3-none-any.whl", f"{NAME}.tar.gz"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project, "it is said in rollout_server/__init__.py"
    metadata = Parser().parsestr(contents(built / f"{NAME}-py3-none-any.whl")[f"{INFO}/METADATA"].decode())
    assert metadata["Version"] == __version__ and metadata["Name"] == project["name"]


def test_the_wheel_has_every_file_of_the_packages(built: Path) -> None:
    held = contents(built / f"{NAME}-py3-none-any.whl")
    assert {name for name in held if not name.startswith(INFO)} == files(*PACKAGES)
    assert {"rollout_server/http/page/static/index.html", "rollout_server/demo/model/model.safetensors"} <= set(held)
    assert f"{INFO}/licenses/LICENSE" in held
    assert b"rollout-server = rollout_server.cli:main" in held[f"{INFO}/entry_points.txt"]


@pytest.mark.long
def test_the_source_archive_makes_the_same_wheel(built: Path, unpacked: Path, tmp_path: Path) -> None:
    build(unpacked, tmp_path, "--target", "wheel")
    name = f"{NAME}-py3-none-any.whl"
    assert contents(tmp_path / name) == contents(built / name)


def test_the_source_archive_has_what_its_checks_and_containers_need(unpacked: Path) -> None:
    wanted = files("tests", "examples", "benchmarks", "docs", "packaging", ".ci", ".github")
    wanted |= {"Makefile", "README.md", "AGENTS.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "pyproject.toml"}
    wanted |= {path.name for path in ROOT.glob("requirements*.txt")}
    assert not {name for name in wanted if not (unpacked / name).is_file()}
