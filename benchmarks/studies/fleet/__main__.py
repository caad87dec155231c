"""What a fleet costs, beside an engine in the process.

`python -m benchmarks.studies.fleet [--rounds 5] [--replicas 2 4] [--json]`. The whole way of rows below HTTP: from
`submit` to the last rollout, on the random model of 33 M parameters. First the engine in this process and one replica
in turns, a ratio within each round; meanwhile the processor time of this process for a replica's rows, which is the
controller's. Two replicas of the embedded model and one, in turns on the same cores. Then, for each number of replicas,
pushes of about 20 MB: until it is staged everywhere, and until the alias has moved everywhere. Then the memory of a
replica that has served (PSS, Linux only).
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
from typing import Any

from rollout_server.machine.blas import load_fast_blas

BLAS = load_fast_blas()

from safetensors.numpy import save  # noqa: E402

import rollout_server  # noqa: E402
from adapters.formats.read import read_bundle  # noqa: E402
from benchmarks.model import VOCAB_SIZE, random_prompts, write_model  # noqa: E402
from rollout_server.engine.handle import EngineHandle  # noqa: E402
from rollout_server.engine.messages.options import EngineOptions  # noqa: E402
from rollout_server.engine.messages.rollouts import RowFinished  # noqa: E402
from rollout_server.engine.messages.versions import Publish  # noqa: E402
from rollout_server.fleet.children import Children  # noqa: E402
from rollout_server.fleet.fleet import Fleet, FleetOptions  # noqa: E402
from rollout_server.rollout import PolicyAddress, RolloutRequest, SamplingParams  # noqa: E402
from tests.support.tiny_models import random_adapter  # noqa: E402

GROUPS, SAMPLES, PROMPT, TOKENS = 8, 8, 64, 64
EMBEDDED = Path(rollout_server.__file__).parent / "demo" / "model"
VOCABULARY = 286
"""The ids of the embedded model that are no special tokens."""
RANK = 64
"""The rank of the adapter that is pushed: about 20 MB on all layers of this model."""
PUSHES = 4


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.fleet", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each way, taken in turns")
    parser.add_argument("--replicas", type=int, nargs="*", default=[2, 4], help="fleets that are pushed to")
    parser.add_argument("--json", action="store_true", help="print one object")
    given = parser.parse_args()
    print(BLAS, file=sys.stderr)
    with tempfile.TemporaryDirectory() as directory:
        figures = asyncio.run(measure(write_model(Path(directory)), given.rounds, given.replicas))
    if given.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:40} {value:10.3f}")
    return 0


async def measure(model: Path, rounds: int, replicas: list[int]) -> dict[str, float]:
    figures = await beside(model, rounds) | await two_beside_one(rounds)
    for count in replicas:
        figures |= await pushed(fleet_of(model, count), f"{count} replicas")
    return figures


def fleet_of(model: Path, count: int) -> EngineHandle:
    made = partial(Fleet, FleetOptions(count, silent_s=120.0), partial(Children, count, ()))
    return EngineHandle(EngineOptions(str(model), "bench"), made)


async def started(handle: EngineHandle) -> EngineHandle:
    handle.start()
    await handle.wait_ready()
    return handle


async def beside(model: Path, rounds: int) -> dict[str, float]:
    """Tokens a second of one replica by those of the engine in this process, and what the controller does for them."""
    one, fleet = await started(EngineHandle(EngineOptions(str(model), "bench"))), await started(fleet_of(model, 1))
    rates: dict[str, list[float]] = {"one": [], "fleet": []}
    controller: list[float] = []
    for round_ in range(rounds + 1):
        for name, handle in (("one", one), ("fleet", fleet)):
            cpu, began = time.process_time(), time.perf_counter()
            tokens = await sampled(handle, round_)
            if round_:  # The first round warms up.
                rates[name].append(tokens / (time.perf_counter() - began))
                controller += [time.process_time() - cpu] if name == "fleet" else []
    pid = fleet.status.replicas[0].pid
    figures = {
        "engine in the process, tok/s": statistics.median(rates["one"]),
        "one replica, tok/s": statistics.median(rates["fleet"]),
        "one replica / in the process": statistics.median(
            a / b for a, b in zip(rates["fleet"], rates["one"], strict=True)
        ),
        "controller, CPU s for 1,000 rows": 1000 * statistics.median(controller) / (GROUPS * SAMPLES),
        "memory of a replica, MB": memory_mb(pid),
    }
    await asyncio.gather(one.close(), fleet.close())
    return figures


async def two_beside_one(rounds: int) -> dict[str, float]:
    """What a second replica brings where both share the cores, for a model so small that its host is the limit."""
    one, two = await started(fleet_of(EMBEDDED, 1)), await started(fleet_of(EMBEDDED, 2))
    rates: dict[str, list[float]] = {"one": [], "two": []}
    for round_ in range(rounds + 1):
        for name, handle in (("one", one), ("two", two)):
            began = time.perf_counter()
            tokens = await sampled(handle, round_, VOCABULARY)
            if round_:
                rates[name].append(tokens / (time.perf_counter() - began))
    await asyncio.gather(one.close(), two.close())
    return {
        "embedded model, one replica, tok/s": statistics.median(rates["one"]),
        "embedded model, two replicas / one": statistics.median(
            a / b for a, b in zip(rates["two"], rates["one"], strict=True)
        ),
    }


async def sampled(handle: EngineHandle, seed: int, vocabulary: int = VOCAB_SIZE) -> int:
    """Tokens of a batch of groups, from `submit` to the last row."""
    id = handle.new_id("bench")
    sampling = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    groups = [
        RolloutRequest(
            id,
            tuple(prompt),
            sampling,
            PolicyAddress("base"),
            SAMPLES,
            index,
            tuple(range(index * SAMPLES, (index + 1) * SAMPLES)),
        )
        for index, prompt in enumerate(random_prompts(GROUPS, PROMPT, seed, vocabulary))
    ]
    events = handle.submit(id, groups)
    return sum([len(event.rollout.token_ids) async for event in events if isinstance(event, RowFinished)])


async def pushed(fleet: EngineHandle, name: str) -> dict[str, float]:
    """Milliseconds until a push is staged everywhere, and until it is live everywhere."""
    await started(fleet)
    stage, flip, nbytes = [], [], 0
    for seed in range(PUSHES):
        tensors, config = random_adapter(fleet.info.layers, RANK, seed)
        bundle = await asyncio.to_thread(read_bundle, save(tensors), config, layers=fleet.info.layers)
        told: Any = await fleet.publish(Publish(fleet.new_id("publish"), "trained", bundle))
        nbytes = bundle.nbytes
        stage.append(told.stage_ms)
        flip.append(told.activate_ms)
    await fleet.close()
    return {
        f"{name}, {nbytes / 1e6:.1f} MB staged, ms": statistics.median(stage[1:]),
        f"{name}, {nbytes / 1e6:.1f} MB flipped, ms": statistics.median(flip[1:]),
    }


def memory_mb(pid: int | None) -> float:
    """The process's proportional share of memory; NaN where the system does not tell."""
    path = Path(f"/proc/{pid}/smaps_rollup")
    if not path.exists():
        return float("nan")
    (line,) = (line for line in path.read_text().splitlines() if line.startswith("Pss:"))
    return int(line.split()[1]) / 1e3


if __name__ == "__main__":
    sys.exit(main())
