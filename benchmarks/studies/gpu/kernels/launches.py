"""What the device does in a decode step, kernel by kernel: where the time goes that adapters cost.

torch's profiler listens to the device whoever launches, so that it counts MLX's kernels too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

from benchmarks.contenders.steady import SteadyRows
from benchmarks.measure import Contender
from benchmarks.studies.gpu.decoding import EIGHT
from benchmarks.studies.gpu.figures import Figure
from benchmarks.studies.gpu.held import Held
from rollout_server.rollout import PolicyAddress

MOST_KERNELS = 45
"""All that take a thousandth of a step or more."""
Kernel = tuple[str, float, int]
"""Its name, the microseconds of all its launches, and how many there were."""


def launches(held: Held) -> Iterator[Figure]:
    """Milliseconds that the device is busy in a step, of the base and of one LoRA, and of their kernels."""
    size = held.size
    engine = held.engine(size.many)
    prompts = held.prompts(-(-size.rows // EIGHT), size.short)
    for name, policy in {"base": PolicyAddress("base"), "one LoRA": held.policy(engine, 1)}.items():
        rows = SteadyRows(engine, prompts, size.rows, size.steps, policies=[policy])
        rows.run()  # What it compiles is no part of a step.
        tokens, kernels = profiled(rows)
        steps = tokens / size.rows
        yield Figure(f"{name}: the device is busy", "ms a step", (sum(each[1] for each in kernels) / 1e3 / steps,))
        yield Figure(f"{name}: launches", "a step", (sum(each[2] for each in kernels) / steps,))
        for kernel, microseconds, count in kernels[:MOST_KERNELS]:
            yield Figure(
                f"{name}: {kernel[:60]}, {count / steps:.1f} a step", "ms a step", (microseconds / 1e3 / steps,)
            )


def profiled(rows: Contender) -> tuple[int, list[Kernel]]:
    """Tokens of one run, and its kernels. Raises `RuntimeError` where torch sees no device."""
    tokens: list[int] = []
    found = kernels_of(lambda: tokens.append(rows.run()[0]))
    return tokens[0], found


def kernels_of(run: Callable[[], object]) -> list[Kernel]:
    """What the device runs meanwhile, the longest first. Raises `RuntimeError` where torch sees no device."""
    # Torch is there only where it is compared with.
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU here, so its profiler would count nothing.")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        mx.synchronize()
        torch.cuda.synchronize()
    seen: list[Any] = [each for each in profile.key_averages() if each.self_device_time_total > 0]
    seen.sort(key=lambda each: -each.self_device_time_total)
    return [(each.key, each.self_device_time_total, each.count) for each in seen]
