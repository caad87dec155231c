"""What parts of the study share, made when it is first asked for: models on disk, one engine, adapters, a bandwidth."""

from __future__ import annotations

import gc
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import mlx.core as mx
from safetensors.numpy import save

from adapters.formats.read import read_bundle
from adapters.prepare import prepare
from benchmarks.contenders.engine import Engine
from benchmarks.studies.gpu.shapes import Size, write_model
from benchmarks.whole_job.job import Adapter, Job
from rollout_server.engine.messages.versions import Publish
from rollout_server.rollout import PolicyAddress


class Held:
    """`folder` is for models and adapters, `out` for what is kept. At most one engine is there at a time, in a stack
    that also holds what else lies on the device; `free` leaves the device to others."""

    def __init__(self, size: Size, rounds: int, folder: Path, out: Path, *, trace: bool) -> None:
        self.size = size
        self.rounds = rounds
        self.out = out
        self._folder = folder
        self._trace = trace
        self._paths: dict[str, Path] = {}
        self._adapters: dict[tuple[str, int, bool], Adapter] = {}
        self._engine: tuple[tuple[str, int], Engine] | None = None
        self._stack = ExitStack()
        self._policies: dict[str, PolicyAddress] = {}
        self._bandwidth: float | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.free()

    def free(self) -> None:
        self._engine = None
        self._policies.clear()
        self._stack.close()
        gc.collect()
        mx.clear_cache()

    # ---- on disk --------------------------------------------------------------------------------------------------

    def path(self, shape: str = "") -> Path:
        """The model of this shape, written once."""
        shape = shape or self.size.shape
        if shape not in self._paths:
            self._paths[shape] = write_model(self._folder / f"qwen3-{shape}", shape)
        return self._paths[shape]

    def job(self) -> Job:
        size = self.size
        return Job(self.path(), size.prompts, size.rows // size.prompts, size.prompt_tokens, size.tokens)

    def adapter(self, seed: int = 1, *, dora: bool = False) -> Adapter:
        key = (self.size.shape, seed, dora)
        if key not in self._adapters:
            self._adapters[key] = Adapter.of(self.path(), seed, dora=dora)
        return self._adapters[key]

    def adapter_folder(self, kind: str) -> Path:
        """The first adapter as `mlx` or `peft` reads it."""
        folder = self._folder / f"adapter-{kind}"
        if folder.exists():
            return folder
        adapter = self.adapter()
        return adapter.save_for_mlx_lm(folder) if kind == "mlx" else adapter.save_for_peft(folder)

    def trace_options(self, name: str) -> tuple[str, ...]:
        """Options of a server whose timeline is kept."""
        return ("--trace", str(self.out / f"trace-{name}.json")) if self._trace else ()

    # ---- on the device --------------------------------------------------------------------------------------------

    def engine(self, rows: int, shape: str = "", kv_memory: int = 0) -> Engine:
        """With room for so many rows and at least so many bytes of their KV: what a server takes where that is enough.
        Another one is closed first."""
        shape = shape or self.size.shape
        held = self._engine
        engine = held[1] if held is not None and held[0] == (shape, rows) else self.start(rows, shape)
        return self.start(rows, shape, kv_memory) if kv_memory > engine.handle.info.kv_memory else engine

    def start(self, rows: int, shape: str, kv_memory: int | None = None) -> Engine:
        """A new one, with so many bytes of KV; None: what a server takes."""
        self.free()
        engine = self._stack.enter_context(Engine(self.path(shape), rows, prefix_cache=False, kv_memory=kv_memory))
        self._engine = ((shape, rows), engine)
        return engine

    def policy(self, engine: Engine, seed: int, *, dora: bool = False) -> PolicyAddress:
        """An adapter of its own, published on this engine once."""
        name = f"{'dora' if dora else 'lora'}{seed}"
        if name not in self._policies:
            adapter, info = self.adapter(seed, dora=dora), engine.handle.info
            bundle = read_bundle(save(adapter.tensors), adapter.config, layers=info.layers)
            ready = prepare(bundle, info.dtype, mode=bundle.spec.modes[0], parameters=info.weights)
            command = Publish(engine.handle.new_id("publish"), name, bundle, prepared=ready)
            engine.wait_for(engine.handle.publish(command))
            self._policies[name] = PolicyAddress(name)
        return self._policies[name]

    def prompts(self, count: int, length: int, seed: int = 0) -> list[list[int]]:
        return Job(self.path(), count, 1, length, 1).ids(seed)

    def bandwidth(self) -> float:
        """Bytes a second that a large addition reads and writes; the best of five."""
        if self._bandwidth is None:
            values = mx.random.normal((1 << (20 if self.size.shape == "tiny" else 28),))
            mx.eval(values)
            best = float("inf")
            for _ in range(5):
                begin = time.perf_counter()
                mx.eval(values + 1)
                best = min(best, time.perf_counter() - begin)
            self._bandwidth = 2 * values.nbytes / best
            del values
            mx.clear_cache()
        return self._bandwidth

    @property
    def about(self) -> dict[str, Any]:
        return {name: str(value) for name, value in mx.device_info().items()}
