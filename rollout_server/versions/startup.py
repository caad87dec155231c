"""From a configuration to a ready engine: which model, with which options, and what is published before it is ready."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from pathlib import Path

from adapters.versions.store import StateStore, StoreError
from rollout_server.config import GpuSettings, ServerConfig
from rollout_server.engine.handle import EngineHandle
from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.messages.versions import Publish
from rollout_server.errors import EngineUnavailable, InvalidField, RolloutError
from rollout_server.fleet.fleet import Fleet, FleetOptions
from rollout_server.machine.blas import cuda_build
from rollout_server.machine.gpus import gpus_for
from rollout_server.model_source.model_files import resolve_model
from rollout_server.versions.adapter_directory import read_adapter_directory
from rollout_server.versions.publisher import Publisher, check_name

log = logging.getLogger("rollout_server.http")


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
        trace=None if config.trace is None else str(config.trace.expanduser()),
    )


def make_handle(config: ServerConfig) -> EngineHandle:
    """The handle of one engine in this process, or of a fleet of engines in others."""
    options = engine_options(config)
    if config.replicas is None:
        return EngineHandle(options)
    # Elsewhere than on CUDA all share the one device that there is.
    gpus = gpus_for(config.replicas, GpuSettings().names) if cuda_build() else ()
    fleet = FleetOptions(config.replicas, config.min_replicas, config.replica_timeout_s, gpus)
    return EngineHandle(options, partial(Fleet, fleet))


def open_state(config: ServerConfig) -> StateStore | None:
    """The store of `--state-dir`. Raises `InvalidField` where it cannot be used."""
    if config.state_dir is None:
        return None
    try:
        return StateStore(config.state_dir.expanduser())
    except StoreError as error:
        raise InvalidField(error.message, param="state_dir") from error


class Startup:
    """Waits for the engine, then restores what the state directory holds and publishes the configured adapters.
    `/ready` follows it."""

    def __init__(self, config: ServerConfig, engine: EngineHandle, publisher: Publisher) -> None:
        self._config = config
        self._engine = engine
        self._publisher = publisher
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> asyncio.Task[None]:
        """Starts on the running event loop; `check` and `finished` tell how it went."""
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(_log_fault)
        return self._task

    async def _run(self) -> None:
        await self._engine.wait_ready()
        self._check_context()
        # transformers sets truncation and padding at the first call; later ones may then share it between threads.
        self._engine.tokenizer.encode("")
        restored = await self._publisher.restore()
        for name, directory in self._config.adapters:
            if name in restored:
                # It serves what was live, and not again what it began with.
                log.info("%s was restored, so %s is not published again", name, directory)
                continue
            await self._publish(name, directory)

    def _check_context(self) -> None:
        asked, own = self._config.context_length, self._engine.info.max_model_len
        if asked is not None and own < asked:
            raise InvalidField(
                f"--context-length asks for {asked} tokens, but the context of {self._engine.info.id} holds {own}: "
                "leave the option out, or give less.",
                param="context_length",
            )

    async def _publish(self, name: str, directory: Path) -> None:
        info = self._engine.info
        check_name(name, info.id)
        prepared = await asyncio.to_thread(read_adapter_directory, directory, info)
        publish = Publish(self._engine.new_id("publish"), name, prepared.bundle, prepared=prepared)
        published = await self._publisher.publish(publish)
        log.info("%s@%d is %s from %s", name, published.version.number, published.version.digest, directory)

    async def finished(self) -> None:
        """Waits until the server is ready; raises what stood in the way."""
        if self._task is None:
            raise EngineUnavailable("The server was not started.")
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


def _log_fault(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (fault := task.exception()) is not None:
        known = isinstance(fault, RolloutError)
        log.error("The server cannot start: %s", fault, exc_info=None if known else fault)
