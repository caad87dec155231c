"""How long the sums of one step take by themselves, on ranks that do nothing else.

    python -m benchmarks.studies.gpu.several.sums BACKEND ROWS WIDTH LAYERS

is run once for each rank, and rank 0 prints seconds.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack

from benchmarks.studies.gpu.several.engines import Machine
from rollout_server.engine.messages.options import RankOptions
from rollout_server.fleet.ranks.environment import file_of, hosts_of, of_lead, of_rank

STEPS = 20
A_LAYER = 2
"""Sums: behind attention and behind the feed-forward part; one more gives all ranks rank 0's ids."""


def seconds_of_sums(machine: Machine, ranks: int, rows: int, width: int, layers: int) -> float:
    """The median of some steps, one after another. Raises `CalledProcessError` where a rank fails."""
    options, hosts = RankOptions(ranks, machine.backend, devices=machine.gpus[:ranks]), hosts_of(ranks)
    shared = {**os.environ, **of_lead(options)}
    command = [sys.executable, "-m", "benchmarks.studies.gpu.several.sums"]
    command += [machine.backend, str(rows), str(width), str(layers)]
    with ExitStack() as files:
        processes = [
            subprocess.Popen(
                command,
                stdin=files.enter_context(file_of(hosts)),
                stdout=subprocess.PIPE,
                env={**shared, **of_rank(rank, options)},
            )
            for rank in range(ranks)
        ]
        said = [process.communicate(timeout=300)[0] for process in processes]
    for process in processes:
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
    return float(said[0])


def main() -> int:
    import mlx.core as mx

    backend, *numbers = sys.argv[1:]
    rows, width, layers = map(int, numbers)
    group = mx.distributed.init(strict=True, backend=backend)
    values, ids, taken = mx.ones((rows, 1, width), mx.bfloat16), mx.zeros((rows,), mx.int32), []
    mx.eval(values, ids)
    for _ in range(STEPS + 3):
        began, summed = time.perf_counter(), values
        for _ in range(A_LAYER * layers):
            # Each waits for the one before, as in a model.
            summed = mx.distributed.all_sum(summed * 0.5, group=group)
        mx.eval(summed, mx.distributed.all_sum(ids, group=group))
        taken.append(time.perf_counter() - began)
    if group.rank() == 0:
        print(statistics.median(taken[3:]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
