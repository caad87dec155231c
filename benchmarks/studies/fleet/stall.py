"""How long a push keeps the controller's event loop from everything else, as its clients feel it.

    python -m benchmarks.studies.fleet.stall [--megabytes 200] [--replicas 2] [--pushes 3]

A controller in this process, without HTTP, and replicas that join it as processes of their own. A task asks for a turn
every 5 ms while a version is recorded, sent, staged and moved to; told are the longest times between two of its turns,
and the processor time of the loop's thread, which other processes of the machine do not lengthen.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from safetensors.numpy import save

from adapters.bundle import AdapterBundle
from adapters.formats.read import read_bundle
from adapters.versions.store import StateStore

# It loads a fast BLAS before anything imports mlx.
from benchmarks.studies.fleet.__main__ import BLAS
from rollout_server.engine.messages.versions import Publish
from tests.support import tiny_models
from tests.support.fleet.joined_here import Led, live
from tests.support.fleet.machines import replica

SHAPE = {
    "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 8, "head_dim": 64,
}  # fmt: skip
SILENT_S, TURN_S = 120.0, 0.005


class Turns:
    """Notes when it had a turn."""

    def __init__(self) -> None:
        self.longest = 0.0

    async def ask(self) -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(TURN_S)
            now = time.perf_counter()
            self.longest, last = max(self.longest, now - last), now


def version(layers: dict[str, tuple[int, int]], megabytes: float, seed: int) -> AdapterBundle:
    """LoRA on every linear layer, of the rank that comes to so many megabytes."""
    rank = round(megabytes * 1e6 / 4 / sum(map(sum, layers.values())))
    tensors, config = tiny_models.random_adapter(layers, rank, seed)
    return read_bundle(save(tensors), config, layers=layers)


async def pushed(led: Led, bundle: AdapterBundle) -> str:
    turns = Turns()
    asking = asyncio.create_task(turns.ask())
    began, used = time.perf_counter(), time.thread_time()
    await led.publisher.publish(Publish(led.handle.new_id("p"), "trained", bundle))
    took, busy = time.perf_counter() - began, time.thread_time() - used
    asking.cancel()
    return (
        f"{bundle.nbytes / 1e6:.0f} MB: {took:.2f} s; longest between two turns {1e3 * turns.longest:.0f} ms; "
        f"the loop's thread was busy for {busy:.2f} s"
    )


async def measured(model: Path, state: Path, megabytes: float, replicas: int, pushes: int) -> None:
    led = Led(model, StateStore(state), SILENT_S)
    url = f"http://127.0.0.1:{await led.open()}"
    with ExitStack() as machines:
        for _ in range(replicas):
            machines.enter_context(replica(model, url))
        await led.ready()
        await live(led, replicas)
        layers = tiny_models.linear_layers(model)
        for seed in range(pushes):
            bundle = await asyncio.to_thread(version, layers, megabytes, seed)
            sys.stdout.write(await pushed(led, bundle) + "\n")
            sys.stdout.flush()
        await led.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=200.0)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--pushes", type=int, default=3)
    given = parser.parse_args()
    sys.stderr.write(f"{BLAS}\n")
    with tempfile.TemporaryDirectory() as directory:
        model = tiny_models.build("qwen3", Path(directory) / "model", **SHAPE)
        asyncio.run(measured(model, Path(directory) / "state", given.megabytes, given.replicas, given.pushes))


if __name__ == "__main__":
    main()
