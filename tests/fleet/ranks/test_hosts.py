"""A file of hosts with an error is refused with what is wrong and where, before anything is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rollout_server.config import ServerConfig, forwarded
from rollout_server.engine.messages.options import RankOptions
from rollout_server.errors import InvalidField
from rollout_server.fleet.ranks.hosts import Host, launching, lead_address, read_hosts
from rollout_server.versions.startup import ranks_of

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


def test_a_rank_learns_where_rank_0_is_from_what_mlx_launch_has_told_it(tmp_path: Path) -> None:
    ring = written(tmp_path, [["10.0.0.1:32323", "10.0.1.1:32324"], ["10.0.0.2:32325"]])
    assert lead_address(None, None, ring) == "10.0.0.1"
    assert lead_address(None, "10.0.0.3:32323", None) == "10.0.0.3"
    assert lead_address("10.0.0.4", None, None) == "10.0.0.4"
    assert lead_address(None, None, None) is None
    with pytest.raises(InvalidField, match="lists no addresses of ranks"):
        lead_address(None, None, written(tmp_path, "[]"))


def test_a_launched_rank_needs_no_file_of_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ServerConfig(tensor_parallel=2, backend="ring", hostfile=tmp_path / "elsewhere.json")
    with pytest.raises(InvalidField, match="cannot be read"):
        ranks_of(config)
    monkeypatch.setenv("MLX_RANK", "1")
    monkeypatch.setenv("MLX_HOSTFILE", str(written(tmp_path, [["10.0.0.1:32323"], ["10.0.0.2:32324"]])))
    assert ranks_of(config) == RankOptions(2, "ring", launched=True, address="10.0.0.1")


def test_ranks_on_other_hosts_are_given_the_variables_but_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROLLOUT_KV_MEMORY", "64MiB")
    monkeypatch.setenv("ROLLOUT_ALSO_UNKNOWN", "1")
    for name in ("API", "ADMIN", "FLEET"):
        monkeypatch.setenv(f"ROLLOUT_{name}_KEY", "a-key-of-thirty-two-characters--")
    assert forwarded() == {"ROLLOUT_KV_MEMORY": "64MiB"}
    command = launching(Path("hosts.json"), "ring", forwarded(), ["serve"])
    at = command.index("--env")
    assert command[at : at + 3] == ["--env", "ROLLOUT_KV_MEMORY=64MiB", "--"] and "a-key" not in " ".join(command)
