"""What this device is, as far as defaults depend on it: the memory that may be used, and how fast it is read."""

from __future__ import annotations

import time
from collections.abc import Callable

import mlx.core as mx

from rollout_server.machine.device_defaults import Device
from rollout_server.machine.host_memory import host_memory

FIRST_BYTES, MOST_BYTES = 4 << 20, 1 << 30
SECONDS = 0.05
LONG_ENOUGH_S = 0.002
"""Seconds of one pass, after which launching it counts for little."""


def this_device(clock: Callable[[], float] = time.perf_counter) -> Device:
    """Takes about `SECONDS`, and at most a sixteenth of the memory meanwhile; a CPU is not measured."""
    memory, cpu = device_memory(), mx.default_device() == mx.cpu
    return Device(memory, 0.0 if cpu else measure_bandwidth(min(MOST_BYTES, memory // 32), clock), cpu)


def device_memory() -> int:
    """Bytes that this process may have on the device, those that it has already included."""
    if mx.default_device() != mx.cpu:
        info = mx.device_info()
        found = {name: size for name, size in info.items() if isinstance(size, int) and size > 0}
        own = mx.get_active_memory() + mx.get_cache_memory()
        # Metal says memory_size and what of it may be used, CUDA total_memory and what nobody uses yet.
        sizes = [
            found[name] for name in ("max_recommended_working_set_size", "memory_size", "total_memory") if name in found
        ]
        if "free_memory" in found:
            sizes.append(found["free_memory"] + own)
        if sizes:
            return min(sizes)
    return host_memory()


def measure_bandwidth(most: int = MOST_BYTES, clock: Callable[[], float] = time.perf_counter) -> float:
    """Bytes a second that an elementwise operation reads and writes, the best of some passes over ever larger arrays,
    so that neither a cache nor the launch is measured."""
    size, best, taken, began = min(FIRST_BYTES, most), 0.0, 0.0, clock()
    while size <= most and (not best or (taken < LONG_ENOUGH_S and clock() - began < SECONDS)):
        taken = _seconds(size, clock)
        best = max(best, 2 * size / taken) if taken > 0 else best
        size *= 2
    mx.clear_cache()
    return best


def _seconds(size: int, clock: Callable[[], float]) -> float:
    """Seconds that a second pass over so many bytes takes: the first one pays for the memory of its result."""
    numbers = mx.zeros((size // 4,), dtype=mx.float32)
    mx.eval(numbers)
    mx.eval(numbers + 1.0)
    before = clock()
    mx.eval(numbers + 1.0)
    return clock() - before
