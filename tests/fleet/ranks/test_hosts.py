"""A file of hosts with an error is refused with what is wrong and where, before anything is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rollout_server.errors import InvalidField
from rollout_server.fleet.ranks.hosts import Host, read_hosts

FIRST, SECOND = {"ssh": "one", "ips": ["10.0.0.1"]}, {"ssh": "two", "ips": ["10.0.0.2", "10.0.1.2"]}


def written(directory: Path, content: Any) -> Path:
    path = directory / "hosts.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize("content", [[FIRST, SECOND], {"backend": "ring", "hosts": [FIRST, SECOND]}])
def test_hosts_are_read_as_mlx_launch_reads_them(tmp_path: Path, content: Any) -> None:
    hosts = read_hosts(written(tmp_path, content), 2, "ring")
    assert hosts == (Host("one", ("10.0.0.1",)), Host("two", ("10.0.0.2", "10.0.1.2")))


@pytest.mark.parametrize(
    ("content", "backend", "said"),
    [
        ("{", "ring", "is no JSON"),
        ("3", "ring", "neither a list of hosts nor an object"),
        ({"backend": "ring"}, "ring", "neither a list of hosts nor an object"),
        ([FIRST], "ring", "names 1 hosts, and --tensor-parallel asks for 2 ranks"),
        ([FIRST, "two"], "ring", "host 1 is no object"),
        ([FIRST, {"ips": ["10.0.0.2"]}], "ring", 'host 1 has no "ssh"'),
        ([FIRST, {"ssh": "two", "ips": "10.0.0.2"}], "ring", "\"ips\" of host 1 ('two') is no list"),
        ([FIRST, {"ssh": "two"}], "ring", "host 1 ('two') has no \"ips\""),
        ([FIRST, SECOND], "jaccl", '"rdma" of host 0 does not list a device for each of 2 hosts'),
        (
            [FIRST | {"rdma": ["rdma_en2", "rdma_en2"]}, SECOND | {"rdma": ["rdma_en2", None]}],
            "jaccl",
            '"rdma" of host 0 names a device for itself',
        ),
    ],
)
def test_a_file_with_an_error_is_refused_by_name(tmp_path: Path, content: Any, backend: str, said: str) -> None:
    with pytest.raises(InvalidField) as refused:
        read_hosts(written(tmp_path, content), 2, backend)
    assert said in refused.value.message and "hosts.json" in refused.value.message
    assert refused.value.param == "hostfile"


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidField, match="cannot be read: No such file"):
        read_hosts(tmp_path / "hosts.json", 2, "ring")
