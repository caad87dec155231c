"""The bill of materials lists what a user gets, and no tool of our tests."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def shipped(*locks: str) -> dict[str, str]:
    """Version by name."""
    command = [sys.executable, str(ROOT / "packaging" / "shipped.py"), *locks]
    printed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^ ]+)", printed, flags=re.MULTILINE)
    assert len(found) == len(dict(found)) and printed.count("--hash=sha256:") >= len(found)
    return dict(found)


def test_it_is_what_the_project_asks_for_and_what_that_needs() -> None:
    found = shipped("requirements.lock.txt")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    asked = project["project"]["dependencies"] + project["project"]["optional-dependencies"]["demo"]
    assert {re.split(r"[^A-Za-z0-9._-]", each)[0].lower() for each in asked} <= found.keys()
    assert {"idna", "mdurl", "fsspec"} <= found.keys(), "what is needed by what is needed"
    tools = {re.split(r"[^A-Za-z0-9._-]", each)[0] for group in ("test", "check")
             for each in project["dependency-groups"][group]}  # fmt: skip
    needed_anyway = {"markdown-it-py"}  # By rich.
    assert not (tools - needed_anyway) & found.keys()


def test_the_build_for_cuda_brings_its_libraries() -> None:
    plain, cuda = shipped("requirements.lock.txt"), shipped("requirements.lock.txt", "requirements.cuda13.lock.txt")
    assert plain.items() - cuda.items() == {("mlx-cpu", plain["mlx-cpu"])}, "the build for CUDA takes its place"
    assert "mlx-cuda-13" in cuda and any(name.startswith("nvidia-") for name in cuda)
