"""Configuration of the server and of the commands that talk to one: frozen models, and the only readers of the
environment (`ROLLOUT_…`)."""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from rollout_server.fleet.joining.options import check_fleet
from rollout_server.quoting import quoted
from rollout_server.rollout import BASE, NAME_PATTERN, NAME_RULE

GIB = 2**30
MIB = 2**20
SHORTEST_KEY = 16
UNITS = {"": 1, "b": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4} | {
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
SIZE_PATTERN = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?", re.IGNORECASE)


def parse_size(value: Any) -> Any:
    """`2GiB`, `500MB`, `65536` → bytes. Raises ValueError on anything else that is text."""
    if not isinstance(value, str):
        return value
    match = SIZE_PATTERN.fullmatch(value.strip())
    if match is None:
        raise ValueError(
            f"{value!r} is not a size: write a number of bytes, or a number with KiB, MiB, GiB, KB, MB or GB"
        )
    return int(float(match[1]) * UNITS[match[2].lower()])


def parse_adapters(value: Any) -> Any:
    """`NAME=DIR` items, as a list or as one comma-separated text → pairs."""
    items = value.split(",") if isinstance(value, str) else value
    pairs = []
    for item in items:
        if isinstance(item, str):
            name, equals, directory = item.strip().partition("=")
            if not (name and equals and directory):
                raise ValueError(f"{item!r} is not NAME=DIR")
            item = (name, directory)
        pairs.append(item)
    return tuple(pairs)


def parse_also(value: Any) -> Any:
    """`NAME=DIR_OR_HUB_ID` items, as a list or as one comma-separated text → pairs. Raises ValueError for what can be
    no name, and for one that means two models."""
    items = value.split(",") if isinstance(value, str) else value
    pairs: list[tuple[str, str]] = []
    for item in items:
        name, equals, model = item.strip().partition("=") if isinstance(item, str) else (item[0], "=", item[1])
        if not (name and equals and model):
            raise ValueError(f"{quoted(item)} is not NAME=DIR or NAME=HUB_ID")
        if not NAME_PATTERN.fullmatch(name):
            raise ValueError(f"{quoted(name)} is no name of a model, which is {NAME_RULE}")
        if name == BASE:
            raise ValueError(f"{quoted(name)} is what the model of --model is called: choose another name")
        if name in dict(pairs):
            raise ValueError(f"{quoted(name)} names two models: give each a name of its own")
        pairs.append((name, model))
    return tuple(pairs)


def parse_hosts(value: Any) -> Any:
    """Names, as a list or as one comma-separated text; small letters, without the dot at the end."""
    items = value.split(",") if isinstance(value, str) else value
    hosts = tuple(item.strip().lower().removesuffix(".") if isinstance(item, str) else item for item in items)
    for host in hosts:
        if isinstance(host, str) and not re.fullmatch(r"[^\s/:@\[\]*]+", host):
            raise ValueError(f"{host!r} is not the name of a host: write it without scheme, port and path")
    return hosts


def is_address(host: str) -> bool:
    """Returns whether `host` is an IP address, and no name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Returns whether `host` is this machine and nothing else. Another name may resolve to anything."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_key(value: SecretStr | None) -> SecretStr | None:
    """Raises ValueError for what cannot travel in a header."""
    if value is not None and not re.fullmatch(r"[!-~]+", value.get_secret_value()):
        raise ValueError("a key is printable ASCII without spaces, so that it can travel in a header")
    return value


def check_ray_address(value: str | None) -> str | None:
    """Raises ValueError for what is neither `auto` nor HOST:PORT."""
    if value is None or value == "auto" or re.fullmatch(r"[^\s/:@]+:\d{1,5}|\[[0-9a-fA-F:.]+\]:\d{1,5}", value):
        return value
    if value.startswith("ray://"):
        raise ValueError(
            f"{quoted(value)} is the address of Ray's client, which this server is not: run it on a node of the "
            "cluster, and give HOST:PORT as `ray start --head` printed it, or auto"
        )
    raise ValueError(f"{quoted(value)} is no address of a Ray cluster: write HOST:PORT, or auto for this machine's own")


def check_fleet_key(value: SecretStr | None) -> SecretStr | None:
    """Raises ValueError for one that somebody who listens might guess."""
    if value is not None and len(value.get_secret_value()) < SHORTEST_KEY:
        raise ValueError(
            f"a fleet's key has at least {SHORTEST_KEY} characters, since whoever listens may try them out: take "
            "those of `openssl rand -hex 16`"
        )
    return value


def parse_kv_bits(value: Any) -> Any:
    """A text of digits as a number: the command line and the environment give texts."""
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else value


KvBits = Annotated[Literal[8] | None, BeforeValidator(parse_kv_bits)]
RayAddress = Annotated[str | None, AfterValidator(check_ray_address)]
Key = Annotated[SecretStr | None, AfterValidator(check_key)]
FleetKey = Annotated[SecretStr | None, AfterValidator(check_key), AfterValidator(check_fleet_key)]
Size = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]
Hosts = Annotated[tuple[str, ...], NoDecode, BeforeValidator(parse_hosts)]
AdapterDirectories = Annotated[tuple[tuple[str, Path], ...], NoDecode, BeforeValidator(parse_adapters)]
Models = Annotated[tuple[tuple[str, str], ...], NoDecode, BeforeValidator(parse_also)]


class ServerConfig(BaseSettings):
    """Everything `rollout-server serve` can be told. Values given in code win over `ROLLOUT_<NAME>` variables."""

    model_config = SettingsConfigDict(env_prefix="ROLLOUT_", env_ignore_empty=True, frozen=True, extra="forbid")

    model: str | None = None
    """A directory or a Hub id; `None` serves the embedded demo model."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    served_model_name: str | None = Field(default=None, min_length=1, max_length=256)
    """What the base is called on the wire, besides `base`."""
    also: Models = ()
    """Names and directories or Hub ids of models that are served beside it, each by an engine of its own."""
    adapters: AdapterDirectories = ()
    """Names and directories to publish before the server is ready."""
    context_length: int | None = Field(default=None, ge=1)

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    """0 takes a free one."""
    api_key: Key = None
    """Opens inference. Where any key is set, every route but /health, /ready and /schema needs one."""
    admin_key: Key = None
    """Opens inference and whatever changes state. Where only `api_key` is set, state cannot be changed over HTTP."""
    insecure: bool = False
    """Allows a server without keys to listen on an address that others can reach."""
    allow_host: Hosts = ()
    """Names by which a server without keys may be called, besides addresses, this machine's own and `host`: those of a
    proxy or a service in front of it."""

    max_batch: int | None = Field(default=None, ge=1)
    """Rows that decode together; `None`: what the device holds."""
    prefill_tokens: int | None = Field(default=None, ge=1)
    """Tokens read at most in one turn; `None`: what the device reads at its full speed."""
    prefer: Literal["throughput", "latency"] = "throughput"
    """What a turn is planned for: that all rows are done soonest, or that none waits long for its next token."""
    attention: Literal["auto", "mlx"] = "auto"
    """Whose attention and gates forwards may use: what is right and fastest on this device, or MLX's own alone."""
    warm: Literal["on", "off"] = "on"
    """Run shapes of a first batch before the server says that it is ready, on a GPU, as far as 30 s allow."""
    memory: Size | None = None
    """Device memory of weights, versions, keys and values of all models together; `None`: half of the device where
    there are several, and of one what `kv_memory` and `weights_memory` say."""
    kv_memory: Size | None = None
    """Memory for keys and values; `None`: a share of what weights and adapters leave of the device."""
    kv_bits: KvBits = None
    """8 keeps keys and values in so many bits: more rows fit, and log-probabilities are those of what is kept."""
    prefix_cache: Literal["on", "off"] = "on"
    """Keep KV for later requests that begin with the same tokens, in what rows leave of `kv_memory`."""
    weights_memory: Size | None = None
    max_queue: int = Field(default=4096, ge=1)
    """Requests that may be open at once, whether they wait or run."""
    max_rows_per_request: int = Field(default=65536, ge=1)
    keep_versions: int = Field(default=8, ge=1)
    state_dir: Path | None = None
    """Where versions are kept over restarts; without it they end with the process."""
    adapter_dir: Path | None = None
    """The only folder that vLLM's routes load adapters from; without it they load none."""
    max_upload: Size = 2 * GIB
    """Bytes of one upload of weights."""
    max_body: Size = 64 * MIB
    """Bytes of any other request body."""
    max_picture_bytes: Size = 20 * MIB
    """Bytes of one picture, as its file has them."""
    max_picture_pixels: int = Field(default=2**25, ge=1)
    """Width times height of one picture: a small file may be a very large one."""
    max_pictures: int = Field(default=64, ge=1)
    """Pictures of one conversation or sequence."""
    max_request_pixels: int = Field(default=2**27, ge=1)
    """Width times height of all pictures of a request, each counted once: what it costs to make them ready."""
    picture_memory: Size = 256 * MIB
    """Pixels of pictures that were made ready and are kept for requests that show them again, in bytes."""
    allow_image_host: Hosts = ()
    """Hosts that pictures are fetched from; without any, they come as data: URLs alone."""
    replicas: int | None = Field(default=None, ge=1, le=256)
    """Engines, each in a process of its own, that serve behind this address; `None`: one in this process."""
    min_replicas: int = Field(default=1, ge=1)
    """So many of them have to be live for the server to be ready and for versions to change."""
    tensor_parallel: int | None = Field(default=None, ge=1, le=64)
    """Ranks that compute each engine together, each a process with a part of every layer; `None`: one process."""
    backend: Literal["ring", "jaccl", "jaccl-ring", "nccl"] | None = None
    """How MLX sums over ranks; `None`: nccl on CUDA, ring elsewhere."""
    hostfile: Path | None = None
    """Hosts of the ranks, as `mlx.launch` reads them; `None`: all are on this machine."""
    replica_timeout_s: float = Field(default=30.0, gt=0)
    """An engine of another process that is not heard of for so long is ended and started again."""
    ray_address: RayAddress = None
    """The Ray cluster that places them: `auto`, or HOST:PORT of its head; `None`: they are this machine's."""
    replica_place_s: float = Field(default=60.0, gt=0)
    """A replica that Ray has found no place for after so long has none."""
    fleet: bool = False
    """Compute nothing here: replicas of this or other machines join."""
    join: str | None = None
    """The URL of a controller: be a replica of its fleet, and serve nobody else."""
    fleet_key: FleetKey = None
    """What a replica and its controller prove to each other; without it only this machine's replicas join."""
    fleet_cert: Path | None = None
    """The certificate of a controller, that links are encrypted under; of a replica, the one that it trusts."""
    fleet_key_file: Path | None = None
    """The private key of the controller's certificate."""
    page: Literal["on", "off"] = "on"
    """Serve the live page at /, which shows rows, versions and the latest rollouts to whoever has a key."""
    trace: Path | None = None
    """A file to record a timeline of the engine's turns in, in Chrome's trace format."""
    log_format: Literal["text", "json"] = "text"
    otel: Literal["on", "off"] = "off"
    """Trace requests by way of OpenTelemetry, whose packages the extra `otel` brings."""
    shutdown_s: float = Field(default=10.0, gt=0)
    """Seconds that replies which are still being sent may take after the engine has stopped."""

    @field_validator("adapter_dir")
    @classmethod
    def _is_folder(cls, value: Path | None) -> Path | None:
        if value is not None and not value.expanduser().is_dir():
            raise ValueError(f"{value} is no directory")
        return value

    @model_validator(mode="after")
    def _loopback_rule(self) -> ServerConfig:
        # A replica of another's fleet listens on no port, whatever a container sets.
        if self.protected or self.insecure or self.on_loopback or self.join is not None:
            return self
        raise ValueError(
            f"without keys the server listens only on loopback, not on {self.host}: set ROLLOUT_API_KEY and "
            "ROLLOUT_ADMIN_KEY, or pass --insecure to let anybody who reaches this address use and change the model"
        )

    @model_validator(mode="after")
    def _fleet_rule(self) -> ServerConfig:
        check_fleet(self, launched=RankSettings().mlx_rank is not None)
        return self

    @field_validator("join")
    @classmethod
    def _is_controller(cls, value: str | None) -> str | None:
        if value is None:
            return None
        at = urlsplit(value)
        if at.scheme not in ("http", "https") or not at.hostname or at.path.strip("/") or at.query or at.username:
            raise ValueError(f"{value!r} is no controller's URL: write http://HOST:PORT, or https:// to insist on TLS")
        return value

    @property
    def protected(self) -> bool:
        """True if any key is set."""
        return self.api_key is not None or self.admin_key is not None

    @property
    def on_loopback(self) -> bool:
        return is_loopback(self.host)


class RankSettings(BaseSettings):
    """Which rank of a group this process is, and where rank 0 is, as `mlx.launch` says it."""

    model_config = SettingsConfigDict(env_ignore_empty=True, frozen=True, extra="ignore")

    mlx_rank: int | None = None
    """None where nobody launched it as one."""
    mlx_hostfile: Path | None = None
    """Addresses of all ranks, for the ring."""
    mlx_jaccl_coordinator: str | None = None
    """Address and port of rank 0."""
    nccl_host_ip: str | None = None


def forwarded() -> dict[str, str]:
    """The variables of this server that ranks on other hosts are to have. Keys are none of them: they would stand in a
    command line, which others can read."""
    ours = (f"ROLLOUT_{name}".upper() for name in ServerConfig.model_fields if not name.endswith("_key"))
    return {name: os.environ[name] for name in ours if name in os.environ}


class GpuSettings(BaseSettings):
    """Which GPUs this process may use, as CUDA's own variable says it."""

    model_config = SettingsConfigDict(env_ignore_empty=True, frozen=True, extra="ignore")

    cuda_visible_devices: str | None = None

    @property
    def names(self) -> tuple[str, ...] | None:
        """Indices or identifiers; None where all may be used."""
        if self.cuda_visible_devices is None:
            return None
        return tuple(name.strip() for name in self.cuda_visible_devices.split(",") if name.strip())


class ClientSettings(BaseSettings):
    """Where commands that talk to a server find it, and with which key. They read the server's own variables, but only
    these: a server on another machine has a configuration that this one cannot judge."""

    model_config = SettingsConfigDict(env_prefix="ROLLOUT_", env_ignore_empty=True, frozen=True, extra="ignore")

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    api_key: Key = None
    admin_key: Key = None

    @property
    def url(self) -> str:
        """The server's URL; for one that listens on every address, that of loopback."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host.strip("[]"), self.host.strip("[]"))
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def key(self) -> str | None:
        """The more powerful of the two keys."""
        secret = self.admin_key or self.api_key
        return secret.get_secret_value() if secret else None
