"""What a fleet costs where Ray places it, beside the same fleet as processes of this one.

`python -m benchmarks.studies.fleet.placed [--rounds 5] [--replicas 2 4] [--json]`, in an environment with the extra
`ray` (`.venv-ray`, which `make test-ray` sets up). It starts a cluster of its own, a node for each replica and one for
the head, where this machine is reached; `python -m tests.support.fleet.alone -m …` keeps it to loopback. For each
number of replicas the two fleets take turns: pushes of about 20 MB, until staged and until live everywhere, and the
rate of rows on the random model of 33 M parameters, a ratio within each round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

# It loads a fast BLAS before anything imports mlx.
from benchmarks.studies.fleet.__main__ import BLAS, fleet_of, pushed, sampled, started, write_model
from rollout_server.engine.handle import EngineHandle
from rollout_server.engine.messages.options import EngineOptions
from rollout_server.fleet.fleet import Fleet, FleetOptions
from rollout_server.fleet.ray.cluster import ONE_MLX
from rollout_server.fleet.ray.placed import Placed, Placement
from tests.support.fleet.ray_nodes import RayNodes


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.fleet.placed", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each way, taken in turns")
    parser.add_argument("--replicas", type=int, nargs="*", default=[2, 4], help="sizes of fleets")
    parser.add_argument("--json", action="store_true", help="print one object")
    given = parser.parse_args()
    print(BLAS, file=sys.stderr)
    nodes = RayNodes(max(given.replicas), store_bytes=300_000_000)
    try:
        with tempfile.TemporaryDirectory() as directory:
            model = write_model(Path(directory))
            figures: dict[str, float] = {}
            for count in given.replicas:
                figures |= asyncio.run(compared(model, nodes.address, count, given.rounds))
    finally:
        nodes.close()
    if given.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:50} {value:10.3f}")
    return 0


def placed(model: Path, address: str, count: int) -> EngineHandle:
    source = partial(Placed, Placement(address, count, ONE_MLX, within_s=300.0))
    return EngineHandle(EngineOptions(str(model), "bench"), partial(Fleet, FleetOptions(count, silent_s=120.0), source))


async def compared(model: Path, address: str, count: int, rounds: int) -> dict[str, float]:
    figures = await pushed(fleet_of(model, count), f"{count} children")
    figures |= await pushed(placed(model, address, count), f"{count} in Ray")
    await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)
    children, actors = await started(fleet_of(model, count)), await started(placed(model, address, count))
    rates: dict[str, list[float]] = {"children": [], "in Ray": []}
    for round_ in range(rounds + 1):
        for name, handle in (("children", children), ("in Ray", actors)):
            began = time.perf_counter()
            tokens = await sampled(handle, round_)
            if round_:  # The first round warms up.
                rates[name].append(tokens / (time.perf_counter() - began))
    await asyncio.gather(children.close(), actors.close())
    ratios = [a / b for a, b in zip(rates["in Ray"], rates["children"], strict=True)]
    return figures | {
        f"{count} children, tok/s": statistics.median(rates["children"]),
        f"{count} in Ray, tok/s": statistics.median(rates["in Ray"]),
        f"{count} in Ray / children, tok/s": statistics.median(ratios),
    }


if __name__ == "__main__":
    sys.exit(main())
