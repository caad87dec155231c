"""What adapters cost a decode step: base, LoRA, DoRA and mixtures, side by side.

`python -m benchmarks.studies.adapters [--rounds 9]`. The bare loop of `benchmarks.contenders.bare` over the
33M-parameter model, with the rows routed to slots; the ratio of each round is taken, then the median. Also the time to
stage a version.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollout_server.machine.blas import load_fast_blas

if TYPE_CHECKING:
    from adapters.resident.slots import AdapterSlots
    from benchmarks.measure import Load, Result

ROWS = 32
PAIRS = (
    ("base rows", "bare"),
    ("one LoRA", "bare"),
    ("one DoRA", "one LoRA"),
    ("eight LoRA", "one LoRA"),
    ("eight mixed", "one LoRA"),
)
MIXED: tuple[tuple[int, bool, list[str] | None], ...] = (
    (8, False, None),
    (4, True, None),
    (16, False, ["q_proj", "v_proj"]),
    (12, True, ["gate_proj", "up_proj", "down_proj"]),
    (16, False, None),
)
"""Rank, DoRA or not, and the layers it targets."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.adapters", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each contender, taken in turns")
    options = parser.parse_args()
    print(load_fast_blas(), file=sys.stderr)

    from benchmarks.measure import Load

    with tempfile.TemporaryDirectory() as directory:
        results = compare(Path(directory), Load(ROWS, 32, 24), options.rounds)
    for result in results.values():
        print(f"{result.name:12} {result.median:7.1f} tok/s")
    for one, other in PAIRS:
        pairs = zip(results[one].rates, results[other].rates, strict=True)
        print(f"{one} / {other}: {statistics.median(a / b for a, b in pairs):.3f}")
    return 0


def compare(directory: Path, load: Load, rounds: int) -> dict[str, Result]:
    """Results by name; prints how long versions took to stage."""
    import mlx.core as mx
    import mlx_lm

    from adapters.resident.model_layers import adaptable_layers
    from adapters.resident.slots import AdapterSlots
    from benchmarks.contenders.bare import BareLoop
    from benchmarks.measure import interleave
    from benchmarks.model import random_prompts, write_model

    path = write_model(directory / "model")
    bare, _ = mlx_lm.load(str(path))
    model, _ = mlx_lm.load(str(path))
    every = adaptable_layers(model)
    linear = {name: shape for name, shape in every.items() if "embed" not in name and "lm_head" not in name}
    slots = AdapterSlots(model, every, mx.float32)
    prompts = random_prompts(ROWS, load.prompt_tokens)

    class Routed(BareLoop):
        """The bare loop, its rows on the given slots."""

        def __init__(self, name: str, route: list[int]) -> None:
            super().__init__(model, prompts, load, compiled=False)
            self.name = name
            self._route = route

        def run(self) -> tuple[int, float]:
            slots.route(self._route)
            return super().run()

    routed = [Routed(name, route) for name, route in stage_all(slots, linear).items()]
    contenders = [BareLoop(bare, prompts, load, compiled=False), *routed]
    return {result.name: result for result in interleave(contenders, rounds)}


def stage_all(slots: AdapterSlots, linear: dict[str, tuple[int, int]]) -> dict[str, list[int]]:
    """The slot of each row for every contender; prints the time of the first LoRA, a later one, and two DoRA."""
    from adapters.prepare import prepare
    from tests.support.adapter_files import make

    def stage(what: str, seed: int, **options: Any) -> int:
        prepared = prepare(make(linear, seed, **options), "float32")
        began = time.perf_counter()
        slot = slots.stage(prepared)
        if what:
            print(f"stage {what} ({prepared.bundle.nbytes / 1e6:.1f} MB): {1e3 * (time.perf_counter() - began):.1f} ms")
        return slot

    lora = stage("the first LoRA", 1, rank=16)
    others = [stage("a later LoRA" if seed == 30 else "", seed, rank=16) for seed in range(30, 37)]
    dora = stage("the first DoRA", 2, rank=16, dora=True)
    later = stage("a later DoRA", 3, rank=16, dora=True)
    mixed = [stage("", 10 + i, rank=r, dora=d, targets=t) for i, (r, d, t) in enumerate(MIXED)]
    return {
        "base rows": [0] * ROWS,
        "one LoRA": [lora] * ROWS,
        "one DoRA": [dora] * ROWS,
        "eight LoRA": [lora, *others] * (ROWS // 8),
        "eight mixed": [lora, dora, later, *mixed] * (ROWS // 8),
    }


if __name__ == "__main__":
    raise SystemExit(main())
