"""The configuration: sizes, environment, the loopback rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rollout_server.config import ClientSettings, ServerConfig, parse_size
from rollout_server.errors import InvalidField
from rollout_server.versions.startup import engine_options, engines
from tests.support import tiny_models
from tests.support.golden_encoders import copied


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


@pytest.mark.parametrize(
    ("also", "fault"),
    [
        (["rm"], "'rm' is not NAME=DIR or NAME=HUB_ID"),
        (["rm="], "'rm=' is not NAME=DIR"),
        (["=/models/rm"], "is not NAME=DIR"),
        (["a/b=/models/rm"], "'a/b' is no name of a model, which is 1 to 64 letters"),
        (["base=/models/rm"], "'base' is what the model of --model is called"),
        (["rm=/models/one", "rm=/models/two"], "'rm' names two models"),
    ],
)
def test_what_names_no_model_beside_the_base(also: list[str], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        ServerConfig(also=also)  # type: ignore[arg-type]


def test_a_name_that_is_the_base_s_and_a_directory_that_is_not_there(tmp_path: Path) -> None:
    model = tiny_models.build("llama", tmp_path / "first")
    for also in (("first", str(model)), ("rm", str(tmp_path / "nowhere"))):
        with pytest.raises(InvalidField, match=f"--also .*{also[0]}"):
            engines(ServerConfig(model=str(model), also=(also,)))
    with pytest.raises(InvalidField, match="one address could mean both"):
        engines(ServerConfig(model=str(model), served_model_name="org/model", also=(("org", str(model)),)))


def test_every_model_is_run_under_its_own_name_in_its_own_share(tmp_path: Path) -> None:
    first, second = (tiny_models.build(family, tmp_path / family) for family in ("qwen3", "llama"))
    encoder = copied("bert/classify", tmp_path / "bert")
    also = (("other", str(second)), ("enc", str(encoder)))
    config = ServerConfig(
        model=str(first), also=also, memory="1GiB", max_batch=8, kv_bits=8, context_length=64, trace=Path("turns.json")
    )  # type: ignore[arg-type]
    base, other, enc = engines(config)
    assert [each.resident for each in (base, other, enc)] == ["", "other", "enc"]
    assert [each.model_id for each in (base, other, enc)] == ["qwen3", "other", "enc"]
    assert sum(each.memory or 0 for each in (base, other, enc)) <= 2**30
    assert (base.kv_bits, other.kv_bits, enc.kv_bits, enc.kv_memory, enc.max_batch) == (8, 8, None, None, None)
    assert (base.context_length, other.context_length) == (64, None), "it has a context of its own"
    assert [each.trace for each in (base, other, enc)] == ["turns.json", "turns.other.json", "turns.enc.json"]
    with pytest.raises(
        InvalidField, match=r"The models need .* together \(base .*, other .*, enc .*--memory is 256.0 KiB"
    ):
        engines(ServerConfig(model=str(first), also=also, memory="256KiB"))  # type: ignore[arg-type]
    (alone,) = engines(ServerConfig(model=str(first)))
    assert alone.memory is alone.kv_memory is None, "of one model nobody counts unless it is asked for"


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


def test_a_replica_needs_no_key_since_it_listens_nowhere() -> None:
    assert ServerConfig(host="0.0.0.0", join="http://studio:8000").join == "http://studio:8000"


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


FLEET: dict[str, Any] = {"fleet": True, "state_dir": "s"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"replicas": 0}, "greater than or equal to 1"),
        ({"replicas": 2, "min_replicas": 3}, "--min-replicas is 3, and there are only 2 replicas"),
        ({"ray_address": "auto"}, "say with --replicas how many there shall be"),
        ({"ray_address": "ray://head:10001", "replicas": 2}, "'ray://head:10001' is the address of Ray's client"),
        ({"ray_address": "head", "replicas": 2}, "'head' is no address of a Ray cluster: write HOST:PORT, or auto"),
        ({"min_replicas": 2}, "--min-replicas is 2, and there are only 1 replicas"),
        ({"tensor_parallel": 0}, "greater than or equal to 1"),
        ({"backend": "nccl"}, "--hostfile and --backend are of ranks: say how many with --tensor-parallel"),
        ({"tensor_parallel": 2, "backend": "gloo"}, "Input should be 'ring', 'jaccl', 'jaccl-ring' or 'nccl'"),
        ({"tensor_parallel": 2, "hostfile": "hosts.json", "replicas": 2}, "--hostfile names the hosts of one engine"),
        ({"tensor_parallel": 2, "trace": "turns.json"}, "--fleet do not go with --tensor-parallel"),
        ({"tensor_parallel": 2, "replicas": 2, "ray_address": "auto"}, "--fleet do not go with --tensor-parallel"),
        ({"tensor_parallel": 2, "join": "http://studio:8000"}, "with --join ranks are started from --hostfile"),
        ({"replicas": 2, "also": "judge=/models/judge"}, "--also serves several models in one process"),
        ({"replicas": 2, "memory": "2GiB"}, "--memory is shared out in one process"),
        ({"replicas": 2, "trace": "turns.json"}, "--trace records the turns of an engine in this process"),
        ({"fleet": True}, "--fleet needs --state-dir"),
        (FLEET | {"host": "0.0.0.0", "insecure": True}, "set ROLLOUT_FLEET_KEY there and here"),
        (FLEET | {"fleet_key": "short"}, "at least 16 characters"),
        (FLEET | {"fleet_cert": "c.pem"}, "--fleet-cert and --fleet-key-file belong together"),
        (FLEET | {"replicas": 2}, "--replicas is about engines of this machine"),
        (FLEET | {"tensor_parallel": 2}, "--ray-address and --fleet do not go with --tensor-parallel"),
        (FLEET | {"also": "judge=/models/judge"}, "--also serves several models in one process"),
        ({"fleet_cert": "c.pem"}, "--fleet-cert and --fleet-key-file are about a fleet"),
        (FLEET | {"kv_memory": "1GiB"}, "--kv-memory is each replica's own"),
        (FLEET | {"warm": "on"}, "--warm is each replica's own"),
        ({"join": "http://studio", "max_queue": 8}, "--max-queue is the controller's to say"),
        ({"tensor_parallel": 1, "backend": "ring"}, "--hostfile and --backend are of ranks"),
        ({"join": "studio:8000"}, "is no controller's URL"),
        ({"join": "http://studio/v1"}, "is no controller's URL"),
        ({"join": "http://studio", "state_dir": "s"}, "--state-dir is for a server"),
        ({"join": "http://studio", "adapters": "one=/a"}, "--adapter is for a server"),
        ({"join": "http://studio", "fleet_key_file": "k.pem"}, "a replica has no private key"),
    ],
)
def test_a_fleet_that_cannot_be_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ServerConfig(**given)


def test_ranks_that_were_launched_are_one_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_RANK", "0")
    with pytest.raises(ValidationError, match="these ranks were launched as one engine"):
        ServerConfig(tensor_parallel=2, replicas=2)
    assert ServerConfig(tensor_parallel=2, join="http://studio:8000").hostfile is None
