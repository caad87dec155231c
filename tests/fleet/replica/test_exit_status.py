"""How a replica's process ends that is to be started again."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rollout_server.fleet.wire import AGAIN

DIES = """
from rollout_server.demo.run import model_directory
from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.messages.status import EngineStatus
from rollout_server.fleet.replica.engine import ReplicaEngine
replica = ReplicaEngine(EngineOptions(str(model_directory()), "demo", kv_memory=2**24), print)
replica.load()
replica.show(EngineStatus("dead", "a test"))
"""


@pytest.mark.long
def test_a_replica_whose_engine_ends_asks_to_be_started_again() -> None:
    ended = subprocess.run([sys.executable, "-c", DIES], capture_output=True, text=True, timeout=200)
    assert ended.returncode == AGAIN, ended.stderr
    assert "so the replica ends: a test" in ended.stderr
