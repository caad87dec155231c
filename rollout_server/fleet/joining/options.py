"""What options of several engines go together: what does not is refused by name, as the configuration is read."""

from __future__ import annotations

from typing import Any

OWN = (
    "max_batch", "kv_memory", "weights_memory", "prefix_cache", "prefill_tokens", "prefer", "attention", "warm",
)  # fmt: skip
"""What each replica that joins is told where it is started."""
CONTROLLERS = ("keep_versions", "max_queue")
"""What a replica that joins leaves to its controller."""


def check_fleet(config: Any, *, launched: bool) -> None:
    """`config` is a `ServerConfig`, which this room does not import. Raises ValueError for options that do not go
    together. `launched`: this process is one of several ranks that were started already."""
    _check_engines(config)
    _check_ranks(config, launched=launched)
    if config.fleet:
        _check_controller(config)
    if config.join is not None:
        _check_replica(config)
    elif not config.fleet and (config.fleet_cert or config.fleet_key_file):
        raise ValueError("--fleet-cert and --fleet-key-file are about a fleet: give --fleet or --join, too")


def _check_engines(config: Any) -> None:
    replicas = config.replicas or 1
    if config.min_replicas > replicas and not config.fleet:
        raise ValueError(f"--min-replicas is {config.min_replicas}, and there are only {replicas} replicas")
    if config.ray_address is not None and config.replicas is None:
        raise ValueError("--ray-address says where replicas are placed: say with --replicas how many there shall be")
    if config.replicas is not None and config.also:
        raise ValueError("--also serves several models in one process: leave it out with --replicas")
    if config.replicas is not None and config.memory is not None:
        raise ValueError("--memory is shared out in one process: with --replicas give each --kv-memory of its own")
    if config.replicas is not None and config.trace is not None:
        raise ValueError("--trace records the turns of an engine in this process: leave it out with --replicas")


def _check_ranks(config: Any, *, launched: bool) -> None:
    ranks, replicas = config.tensor_parallel or 1, config.replicas or 1
    if ranks == 1 and (config.hostfile is not None or config.backend is not None):
        raise ValueError("--hostfile and --backend are of ranks: say how many with --tensor-parallel, 2 or more")
    if config.hostfile is not None and replicas > 1:
        raise ValueError("--hostfile names the hosts of one engine: leave --replicas out, and join others with it")
    if launched and ranks > 1 and replicas > 1:
        raise ValueError(
            "MLX_RANK is set, so these ranks were launched as one engine: leave --replicas out, or start without "
            "mlx.launch"
        )
    if config.tensor_parallel is None:
        return
    if config.also or config.memory or config.trace or config.ray_address or config.fleet:
        raise ValueError("--also, --memory, --trace, --ray-address and --fleet do not go with --tensor-parallel")
    if config.join is not None and config.hostfile is None and not launched:
        raise ValueError("with --join ranks are started from --hostfile, which names this host for each of its ranks")


def _check_controller(config: Any) -> None:
    if config.state_dir is None:
        raise ValueError("--fleet needs --state-dir, since replicas that join are filled with the versions there")
    if not config.on_loopback and config.fleet_key is None:
        raise ValueError(
            f"on {config.host} replicas of other machines may join: set ROLLOUT_FLEET_KEY there and here, so that "
            "nobody else is sent prompts and weights"
        )
    if (config.fleet_cert is None) != (config.fleet_key_file is None):
        raise ValueError("--fleet-cert and --fleet-key-file belong together: give both, or leave links unencrypted")
    for name in ("replicas", "memory", "trace", "ray_address"):
        if getattr(config, name) is not None:
            raise ValueError(f"{_option(name)} is about engines of this machine, and --fleet has none: leave one out")
    for name in OWN:
        if name in config.model_fields_set:
            raise ValueError(f"{_option(name)} is each replica's own: give it where they are started with --join")
    if config.also:
        raise ValueError("--also serves several models in one process: leave it out with --fleet")


def _check_replica(config: Any) -> None:
    if config.fleet_key_file is not None:
        raise ValueError("--fleet-key-file is the controller's: a replica has no private key")
    for name in ("fleet", "replicas", "ray_address", "also", "adapters", "adapter_dir", "state_dir", "memory"):
        if getattr(config, name):
            raise ValueError(f"{_option(name)} is for a server, and with --join this is a replica of another's fleet")
    for name in CONTROLLERS:
        if name in config.model_fields_set:
            raise ValueError(f"{_option(name)} is the controller's to say: give it where serve --fleet is started")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-").replace("adapters", "adapter")
