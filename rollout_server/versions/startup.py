"""From a configuration to a ready engine: which model, with which options, and what is published before it is ready."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from adapters.versions.store import StateStore, StoreError
from rollout_server.config import GpuSettings, RankSettings, ServerConfig, is_loopback
from rollout_server.engine.handle import EngineHandle
from rollout_server.engine.messages.options import EngineOptions, RankOptions
from rollout_server.engine.messages.versions import Publish
from rollout_server.errors import EngineUnavailable, InvalidField, RolloutError
from rollout_server.fleet.children import Children
from rollout_server.fleet.fleet import Fleet, FleetOptions
from rollout_server.fleet.joining.door import Door, Lock
from rollout_server.fleet.ranks.hosts import lead_address, read_hosts
from rollout_server.fleet.ray.cluster import ONE_GPU, ONE_MLX
from rollout_server.fleet.ray.placed import Placed, Placement
from rollout_server.machine.blas import cuda_build
from rollout_server.machine.gpus import gpus_for
from rollout_server.machine.memory_shares import SHARE_OF_DEVICE, Claim, share_out
from rollout_server.model_source.model_files import resolve_model
from rollout_server.quoting import quoted
from rollout_server.rollout import BASE
from rollout_server.versions.adapter_directory import read_adapter_directory
from rollout_server.versions.publisher import Publisher

log = logging.getLogger("rollout_server.http")

MODELS = "models"
"""Folder of the state directory with a directory for each model beside the base."""


def engine_options(config: ServerConfig) -> EngineOptions:
    """Finds the model (downloading it from the Hub if need be) and says how to run it."""
    path, name = resolve_model(config.model, config.revision)
    return EngineOptions(
        model_path=str(path),
        model_id=config.served_model_name or name,
        context_length=config.context_length,
        max_batch=config.max_batch,
        prefill_tokens=config.prefill_tokens,
        prefer=config.prefer,
        attention=config.attention,
        warm=config.warm == "on",
        kv_memory=config.kv_memory,
        kv_bits=config.kv_bits,
        prefix_cache=config.prefix_cache == "on",
        weights_memory=config.weights_memory,
        max_queue=config.max_queue,
        max_rows_per_request=config.max_rows_per_request,
        keep_versions=config.keep_versions,
        ranks=ranks_of(config),
        trace=None if config.trace is None else str(config.trace.expanduser()),
    )


def ranks_of(config: ServerConfig) -> RankOptions | None:
    """How many ranks an engine has, and how they meet; None for an engine of one process. Raises `InvalidField` for
    hosts that cannot be theirs."""
    size = config.tensor_parallel or 1
    if size == 1:
        return None
    backend = config.backend or ("nccl" if cuda_build() else "ring")
    settings = RankSettings()
    if settings.mlx_rank is not None:
        # The file of hosts is on the host that launched this rank, and perhaps on no other.
        address = lead_address(settings.nccl_host_ip, settings.mlx_jaccl_coordinator, settings.mlx_hostfile)
        ranks = RankOptions(size, backend, launched=True, silent_s=config.replica_timeout_s)
        return replace(ranks, address=address) if address else ranks
    if config.hostfile is not None:
        read_hosts(config.hostfile, size, backend)
    return RankOptions(size, backend, silent_s=config.replica_timeout_s)


def engines(config: ServerConfig) -> tuple[EngineOptions, ...]:
    """How to run the model of `--model`, and then those of `--also`, in their order. Raises `InvalidField` for names
    that could mean two models, and where the models do not fit `--memory` together."""
    base = engine_options(config)
    others = [_beside(config, base, name, model) for name, model in config.also]
    if not others and config.memory is None:
        return (base,)
    models = (BASE, *(other.resident for other in others)) if others else ()
    return _sharing(config, [replace(options, models=models) for options in (base, *others)])


def _beside(config: ServerConfig, base: EngineOptions, name: str, model: str) -> EngineOptions:
    """Another model is run as the base is, under its own name and with its own context."""
    if base.model_id.partition("/")[0] == name:
        raise InvalidField(
            f"--also calls a model {quoted(name)}, and the model of --model is called {quoted(base.model_id)}, so that "
            "one address could mean both: choose another name.",
            param="also",
        )
    try:
        path, _ = resolve_model(model)
    except (InvalidField, EngineUnavailable) as error:
        raise type(error)(f"--also {name}={model}: {error.message}", param="also") from error
    trace = None if base.trace is None else str(Path(base.trace).with_stem(f"{Path(base.trace).stem}.{name}"))
    return replace(base, model_path=str(path), model_id=name, resident=name, context_length=None, trace=trace)


def _sharing(config: ServerConfig, every: Sequence[EngineOptions]) -> tuple[EngineOptions, ...]:
    """The options with what each model may take of the memory."""
    # One model alone asks nothing of the device before its engine does.
    from rollout_server.engine.model.footprints import footprint_of, memory_of_device

    footprints = [footprint_of(Path(options.model_path)) for options in every]
    claims = [
        Claim(options.resident or BASE, found.weights, not found.encoder, options.weights_memory, options.kv_memory)
        for options, found in zip(every, footprints, strict=True)
    ]
    shares = share_out(config.memory or memory_of_device() // SHARE_OF_DEVICE, claims)
    for claim, share in zip(claims, shares, strict=True):
        log.info("%s", share.sentence(claim))
    return tuple(
        replace(
            options,
            memory=share.memory,
            weights_memory=share.versions,
            kv_memory=share.kv,
            # An encoder beside other models keeps no keys and values, whatever was said of theirs.
            kv_bits=options.kv_bits if claim.has_kv or not options.resident else None,
            max_batch=options.max_batch if claim.has_kv or not options.resident else None,
        )
        for options, claim, share in zip(every, claims, shares, strict=True)
    )


def door_of(config: ServerConfig) -> Door | None:
    """Where replicas join, with `--fleet`. Raises `InvalidField` for a certificate that cannot be used."""
    if not config.fleet:
        return None
    key = config.fleet_key.get_secret_value() if config.fleet_key is not None else None
    try:
        return Door(Lock(key, config.fleet_cert, config.fleet_key_file), is_loopback)
    except (OSError, ValueError) as error:
        raise InvalidField(f"--fleet-cert and --fleet-key-file cannot be used: {error}.", param="fleet_cert") from error


def handle_of(config: ServerConfig, options: EngineOptions, door: Door | None = None) -> EngineHandle:
    """The handle of one engine in this process, or of a fleet of engines in others, which may come in by a door."""
    if door is not None:
        fewest = config.min_replicas
        joined = FleetOptions(fewest, fewest, config.replica_timeout_s, joined=True)
        return EngineHandle(options, partial(Fleet, joined, door.source))
    if config.replicas is None and options.ranks is None:
        return EngineHandle(options)
    # An engine of several ranks is a replica: it fails as one, and is started again as one.
    count, ranks = config.replicas or 1, options.ranks
    fleet = FleetOptions(count, config.min_replicas, config.replica_timeout_s)
    if config.ray_address is not None:
        need = ONE_GPU if cuda_build() else ONE_MLX
        placement = Placement(config.ray_address, count, need, config.replica_place_s)
        return EngineHandle(options, partial(Fleet, fleet, partial(Placed, placement)))
    # Elsewhere than on CUDA all share the one device that there is.
    own = cuda_build() and not (ranks and ranks.launched)
    gpus = gpus_for(count * (ranks.size if ranks else 1), GpuSettings().names) if own else ()
    return EngineHandle(options, partial(Fleet, fleet, partial(Children, count, gpus)))


def open_state(config: ServerConfig, resident: str = "") -> StateStore | None:
    """The store of `--state-dir` for the base, or in a folder of its own there for another model. Raises `InvalidField`
    where it cannot be used."""
    if config.state_dir is None:
        return None
    directory = config.state_dir.expanduser()
    try:
        return StateStore(directory / MODELS / resident if resident else directory)
    except StoreError as error:
        raise InvalidField(error.message, param="state_dir") from error


class Startup:
    """Starts an engine, then restores what the state directory holds and publishes the configured adapters. `/ready`
    follows it. `after` is the start of another model, which is waited for: what an engine measures of the device is
    not to be disturbed."""

    def __init__(
        self,
        config: ServerConfig,
        engine: EngineHandle,
        publisher: Publisher,
        *,
        resident: str = "",
        after: Startup | None = None,
    ) -> None:
        self._config = config
        self._engine = engine
        self._publisher = publisher
        self._resident = resident
        self._after = after
        self._task: asyncio.Task[None] | None = None
        self._wanted = True
        self._awaited = False

    def begin(self) -> asyncio.Task[None]:
        """Starts on the running event loop; `check` and `finished` tell how it went."""
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(self._log_fault)
        return self._task

    async def _run(self) -> None:
        if self._after is not None:
            await self._after.finished()
        self._engine.start()
        await self._engine.wait_ready()
        self._check_context()
        # transformers sets truncation and padding at the first call; later ones may then share it between threads.
        self._engine.tokenizer.encode("")
        restored = await self._publisher.restore()
        for name, directory in self._adapters():
            if name in restored:
                # It serves what was live, and not again what it began with.
                log.info("%s was restored, so %s is not published again", name, directory)
                continue
            await self._publish(name, directory)

    def _adapters(self) -> Iterator[tuple[str, Path]]:
        """Names and directories of what is published for this model: NAME, or RESIDENT/NAME."""
        for address, directory in self._config.adapters:
            model, _, name = address.rpartition("/")
            if model not in ("", *dict(self._config.also)):
                raise InvalidField(
                    f"--adapter {address} is for the model {quoted(model)}, which is not served: name one of --also.",
                    param="adapters",
                )
            if model == self._resident:
                yield name, directory

    def _check_context(self) -> None:
        asked, own = self._config.context_length, self._engine.info.max_model_len
        if asked is not None and own < asked and not self._resident:
            raise InvalidField(
                f"--context-length asks for {asked} tokens, but the context of {self._engine.info.id} holds {own}: "
                "leave the option out, or give less.",
                param="context_length",
            )

    async def _publish(self, name: str, directory: Path) -> None:
        info = self._engine.info
        self._publisher.check_name(name)
        began = time.perf_counter()
        try:
            prepared = await asyncio.to_thread(read_adapter_directory, directory, info)
        except RolloutError as error:
            raise InvalidField(f"--adapter {name}={directory}: {error.message}", param="adapters") from error
        before = (("validate", began, time.perf_counter()),)
        publish = Publish(self._engine.new_id("publish"), name, prepared.bundle, prepared=prepared, before=before)
        published = await self._publisher.publish(publish)
        log.info("%s is %s from %s", published.version, published.version.digest, directory)

    async def finished(self) -> None:
        """Waits until the server is ready; raises what stood in the way."""
        if self._task is None:
            raise EngineUnavailable("The server was not started.")
        self._awaited = True
        await asyncio.shield(self._task)

    def check(self) -> None:
        """Raises `EngineUnavailable` unless the server is ready."""
        if self._task is not None and self._task.done() and (fault := self._task.exception()) is not None:
            raise EngineUnavailable(f"The server could not start: {fault}") from fault
        status = self._engine.status
        if status.state != "ready":
            raise EngineUnavailable(status.fault or f"The engine is {status.state}.")
        live = sum(replica.state == "live" for replica in status.replicas)
        if live < status.fewest:
            raise EngineUnavailable(f"{live} replicas are live, and at least {status.fewest} have to be.")
        if self._task is None or not self._task.done():
            raise EngineUnavailable("Kept versions and configured adapters are still being loaded.")

    def give_up(self) -> None:
        """The server stops: that a start comes to nothing is no fault from now on."""
        self._wanted = False

    def _log_fault(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or (fault := task.exception()) is None or not self._wanted:
            return
        known = isinstance(fault, RolloutError)
        if known and self._awaited:
            # Whoever waits for the start gets the sentence, and says it.
            return
        if self._after is None or not self._after.failed:
            log.error("The server cannot start: %s", fault, exc_info=None if known else fault)

    @property
    def failed(self) -> bool:
        """True where it has told why the server cannot start."""
        return (
            self._task is not None
            and self._task.done()
            and (self._task.cancelled() or self._task.exception() is not None)
        )
