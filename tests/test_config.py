"""The configuration: sizes, environment, the loopback rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rollout_server.config import ClientSettings, ServerConfig, parse_size
from rollout_server.versions.startup import engine_options


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2 * 2**30),
        ("2 GiB", 2 * 2**30),
        ("1.5gib", 3 * 2**29),
        ("500MB", 500_000_000),
        ("64k", 64_000),
        ("64Ki", 65536),
        ("7", 7),
        ("7B", 7),
        (9, 9),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size
    assert ServerConfig(max_upload=text).max_upload == size  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e3", "2 parsecs", "0", 0, -5])
def test_what_is_no_size(text: str | int) -> None:
    with pytest.raises(ValidationError):
        ServerConfig(max_upload=text)  # type: ignore[arg-type]


def test_the_environment_is_read_and_code_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "API_KEY": "a-key",
        "ADMIN_KEY": "",
        "PORT": "9000",
        "MAX_BODY": "1MiB",
        "ADAPTERS": "one=/a,two=/b",
        "KV_MEMORY": "1GiB",
    }.items():
        monkeypatch.setenv(f"ROLLOUT_{name}", value)
    config = ServerConfig(port=9001)
    assert config.port == 9001
    assert config.api_key is not None and config.api_key.get_secret_value() == "a-key"
    assert config.admin_key is None
    assert (config.max_body, config.kv_memory) == (2**20, 2**30)
    assert config.adapters == (("one", Path("/a")), ("two", Path("/b")))
    assert "a-key" not in repr(config)


def test_a_timeline_is_recorded_where_a_file_is_named() -> None:
    assert engine_options(ServerConfig()).trace is None
    assert engine_options(ServerConfig(trace=Path("turns.json"))).trace == "turns.json"


def test_kv_is_kept_in_8_bits_or_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ServerConfig().kv_bits is None
    assert engine_options(ServerConfig(kv_bits=8)).kv_bits == 8
    for wrong in (4, 16, "8.0", "eight"):
        with pytest.raises(ValidationError, match="kv_bits"):
            ServerConfig(kv_bits=wrong)  # type: ignore[arg-type]
    monkeypatch.setenv("ROLLOUT_KV_BITS", "8")
    assert ServerConfig().kv_bits == 8


def test_what_the_engine_is_started_with_follows_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    options = engine_options(ServerConfig())
    assert options.max_batch is options.prefill_tokens is options.kv_memory is None, "chosen for the device"
    assert (options.prefer, options.attention, options.warm) == ("throughput", "auto", True)
    for name, value in {
        "MAX_BATCH": "48",
        "PREFILL_TOKENS": "2048",
        "PREFER": "latency",
        "ATTENTION": "mlx",
        "WARM": "off",
    }.items():
        monkeypatch.setenv(f"ROLLOUT_{name}", value)
    options = engine_options(ServerConfig())
    assert (options.max_batch, options.prefill_tokens) == (48, 2048)
    assert (options.prefer, options.attention, options.warm) == ("latency", "mlx", False)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("max_batch", 0),
        ("max_batch", "many"),
        ("prefill_tokens", 0),
        ("prefer", "both"),
        ("attention", "mine"),
        ("warm", "hot"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(name: str, wrong: object) -> None:
    with pytest.raises(ValidationError, match=name):
        ServerConfig(**{name: wrong})  # type: ignore[arg-type]


def test_adapters_are_names_and_directories() -> None:
    assert ServerConfig(adapters=["one=/a"]).adapters == (("one", Path("/a")),)  # type: ignore[arg-type]
    for wrong in ("one", "=dir", "one="):
        with pytest.raises(ValidationError):
            ServerConfig(adapters=[wrong])  # type: ignore[arg-type]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    assert not ServerConfig(host=host).protected


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "my-host", ""])
def test_other_addresses_need_a_key_or_a_word(host: str) -> None:
    with pytest.raises(ValidationError, match="ROLLOUT_API_KEY"):
        ServerConfig(host=host)
    assert ServerConfig(host=host, insecure=True).host == host
    assert ServerConfig(host=host, api_key="x").protected  # type: ignore[arg-type]


def test_nothing_can_be_changed_or_added() -> None:
    with pytest.raises(ValidationError):
        ServerConfig().port = 5  # type: ignore[misc]
    with pytest.raises(ValidationError):
        ServerConfig(colour="red")  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        ServerConfig(api_key="two words")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("gpu-box", "http://gpu-box:8000"),
        ("::1", "http://[::1]:8000"),
        ("[fe80::1]", "http://[fe80::1]:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
    ],
)
def test_a_client_finds_the_server_by_its_variables(monkeypatch: pytest.MonkeyPatch, host: str, url: str) -> None:
    monkeypatch.setenv("ROLLOUT_HOST", host)
    monkeypatch.setenv("ROLLOUT_KV_MEMORY", "of another machine")
    monkeypatch.setenv("ROLLOUT_API_KEY", "one")
    assert (ClientSettings().url, ClientSettings().key) == (url, "one")
    monkeypatch.setenv("ROLLOUT_ADMIN_KEY", "two")
    assert ClientSettings().key == "two" and "two" not in repr(ClientSettings())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"replicas": 0}, "greater than or equal to 1"),
        ({"replicas": 2, "min_replicas": 3}, "--min-replicas is 3, and there are only 2 replicas"),
        ({"min_replicas": 2}, "--min-replicas is 2, and there are only 1 replicas"),
        ({"replicas": 2, "trace": "turns.json"}, "--trace records the turns of an engine in this process"),
    ],
)
def test_a_fleet_that_cannot_be_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ServerConfig(**given)
