"""What one rank's device computes wrongly is refused on all, and nobody waits for a sum that others leave out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rollout_server.fleet.ranks.environment import file_of, hosts_of
from tests.laws.grids import some_long
from tests.support import tiny_models

pytestmark = pytest.mark.timeout(600)
ONE_RANK = """
import json, sys
from rollout_server.machine.blas import load_fast_blas
load_fast_blas()
import mlx.core as mx
from adapters.resident.layers import slot_stack
from rollout_server.engine.messages.options import EngineOptions, RankOptions
from rollout_server.engine.model.load import load
from rollout_server.fleet.ranks.group import join

path, width, faulty = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
joined = join(RankOptions(2))
own = mx.gather_mm

def wrong(x, matrices, **options):
    found = own(x, matrices, **options)
    return -found if found.shape[-1] == width else found

if joined.rank == faulty:
    slot_stack.mx.gather_mm = wrong
model = load(EngineOptions(path, "tiny", kv_memory=2**24, context_length=64), joined)
print(json.dumps(model.info.unfit))
"""
"""A device that computes one shape of low-rank product wrongly is what `faulty`'s is."""


def unfit(path: Path, width: int, faulty: int) -> list[dict[str, str]]:
    """What each of two ranks says of the kinds of layers that nothing may adapt."""
    hosts, running = hosts_of(2), []
    for rank in range(2):
        with file_of(hosts) as addresses:
            environment = {**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": "/dev/stdin"}
            command = [sys.executable, "-c", ONE_RANK, str(path), str(width), str(faulty)]
            running.append(
                subprocess.Popen(command, stdin=addresses, stdout=subprocess.PIPE, env=environment, text=True)
            )
    try:
        said = [process.communicate(timeout=500)[0] for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    return [json.loads(text.splitlines()[-1]) for text in said]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Of all layers only gate and up have parts of so many outputs.
    return tiny_models.build("qwen3", tmp_path_factory.mktemp("models") / "tiny", intermediate_size=176)


@pytest.mark.long
@pytest.mark.parametrize("faulty", some_long([0, 1], 1))
def test_what_is_unfit_on_one_rank_is_unfit_on_all(path: Path, faulty: int) -> None:
    said = unfit(path, 88, faulty)
    assert [set(each) for each in said] == [{"linear"}, {"linear"}]
    assert "gate_proj (88 × 64, float32)" in said[faulty]["linear"]
    assert said[1 - faulty]["linear"] == f"as rank {faulty} found, whose log says how"
