"""A replica answers whatever it is told of versions, also where it cannot do it."""

from __future__ import annotations

import queue
import threading
from dataclasses import replace
from typing import Any

from safetensors.numpy import save

from adapters.formats.read import read_bundle
from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.messages.rollouts import RequestFailed
from rollout_server.errors import EngineFault
from rollout_server.fleet.replica.engine import ReplicaEngine
from rollout_server.fleet.wire import AdoptVersion, CannotStart, FlipAlias, StageVersion
from tests.support import tiny_models


def test_a_version_that_a_replica_does_not_have_is_answered() -> None:
    told: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
    replica = ReplicaEngine(EngineOptions("nowhere", "tiny"), told.put)
    for message in (AdoptVersion("/stage/1/p", "p", 1), FlipAlias("/flip/1/p", "p", 1, None)):
        replica.apply(message)
        (failed,) = told.get(timeout=30.0)
        assert isinstance(failed, RequestFailed) and failed.id == message.id and isinstance(failed.error, EngineFault)


class Hangs(dict[str, Any]):
    """Tensors of a version at which whatever reads them waits until it is `over`."""

    def __init__(self) -> None:
        self.read, self.over = threading.Event(), threading.Event()

    def __getitem__(self, name: str) -> Any:
        self.read.set()
        self.over.wait()
        raise KeyError(name)


def test_a_replica_ends_although_what_makes_its_versions_ready_hangs() -> None:
    """A controller that has given it up has it started anew, which it has to come to."""
    layers = {"model.layers.0.self_attn.q_proj": (8, 8)}
    tensors, config = tiny_models.random_adapter(layers, 2, 0)
    hangs = Hangs()
    bundle = replace(read_bundle(save(tensors), config, layers=layers), tensors=hangs)
    replica = ReplicaEngine(EngineOptions("nowhere", "tiny"), lambda messages: None)
    assert isinstance(replica.load(), CannotStart)
    replica.apply(StageVersion("/stage/1/1/p", "p", 1, bundle, None, "adapter", False))
    assert hangs.read.wait(10.0)
    stopping = threading.Thread(target=replica.stop, daemon=True)
    stopping.start()
    stopping.join(10.0)
    ended = not stopping.is_alive()
    hangs.over.set()
    assert ended
