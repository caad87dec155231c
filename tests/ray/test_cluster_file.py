"""The cluster file of the guide is one that Ray takes and says what other files say; its page names what Ray has."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import get_auth_token, start

import rollout_server

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "guide" / "ray.md"
FILE = ROOT / "docs" / "guide" / "ray-cluster.yaml"


def test_the_cluster_file_is_valid() -> None:
    config = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    validate_config(prepare_config(config))
    assert len(config["provider"]["worker_ips"]) == config["min_workers"] == config["max_workers"]


def test_the_cluster_file_installs_this_version_with_this_mlx() -> None:
    text = FILE.read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(re.findall(r"rollout_server-(.+?)-py3", text)) == {rollout_server.__version__}
    assert f'"{project["dependency-groups"]["cuda13"][0]}"' in text


def test_ray_has_the_options_that_the_guide_names() -> None:
    named = {"ray get-auth-token": {"--generate"}, "ray start": {"--head", "--port", "--address", "--resources"}}
    for command in (get_auth_token, start):
        known = {option for parameter in command.params for option in parameter.opts}
        assert named[f"ray {command.name}"] <= known
        assert f"ray {command.name}" in PAGE.read_text(encoding="utf-8")
