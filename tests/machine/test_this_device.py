"""What is found out about the device: its memory, and its speed within a bounded time."""

from __future__ import annotations

import mlx.core as mx

from rollout_server.machine.host_memory import host_memory, physical_memory
from rollout_server.machine.this_device import SECONDS, device_memory, measure_bandwidth, this_device


class Clock:
    """Each look takes as long as this."""

    def __init__(self, step: float) -> None:
        self.now, self.looks, self._step = 0.0, 0, step

    def __call__(self) -> float:
        self.now += self._step
        self.looks += 1
        return self.now


def test_the_speed_of_memory_is_that_of_the_clock() -> None:
    """A pass over 1 MiB, read and written, that takes a thousandth of a second."""
    assert measure_bandwidth(1 << 20, Clock(0.001)) == 2 * (1 << 20) / 0.001


def test_a_slow_device_is_measured_once() -> None:
    slow = Clock(SECONDS)
    assert measure_bandwidth(1 << 28, slow) > 0
    assert slow.looks <= 8


def test_measuring_leaves_nothing_in_memory() -> None:
    before = mx.get_active_memory()
    measure_bandwidth(1 << 22)
    # What other tests left behind may be freed meanwhile.
    assert mx.get_active_memory() <= before and mx.get_cache_memory() == 0


def test_this_device_is_described() -> None:
    found = this_device()
    assert found.memory == device_memory() > 2**28
    assert found.cpu == (mx.default_device() == mx.cpu)
    if found.cpu:
        # In a container or a unit with a limit of memory it is less than the machine has.
        assert found.memory == host_memory() <= physical_memory()
    else:
        assert found.bandwidth > 1e9
