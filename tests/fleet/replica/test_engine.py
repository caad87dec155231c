"""A replica answers whatever it is told of versions, also where it cannot do it."""

from __future__ import annotations

import queue
from typing import Any

from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.messages.rollouts import RequestFailed
from rollout_server.errors import EngineFault
from rollout_server.fleet.replica.engine import ReplicaEngine
from rollout_server.fleet.wire import AdoptVersion, FlipAlias


def test_a_version_that_a_replica_does_not_have_is_answered() -> None:
    told: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
    replica = ReplicaEngine(EngineOptions("nowhere", "tiny"), told.put)
    for message in (AdoptVersion("/stage/1/p", "p", 1), FlipAlias("/flip/1/p", "p", 1, None)):
        replica.apply(message)
        (failed,) = told.get(timeout=30.0)
        assert isinstance(failed, RequestFailed) and failed.id == message.id and isinstance(failed.error, EngineFault)
