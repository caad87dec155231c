"""What of `--ray-address` needs no Ray, which most servers do without."""

from __future__ import annotations

import asyncio
import socket
import sys

import pytest

from rollout_server.errors import InvalidField
from rollout_server.fleet.codec.frames import LENGTHS
from rollout_server.fleet.ray.cluster import ONE_MLX, connect
from rollout_server.fleet.ray.connection import take_whole


def test_a_ray_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    # What Python does with a module that is None is to say that it is not there.
    monkeypatch.setitem(sys.modules, "ray", None)
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(InvalidField) as refused:
        asyncio.run(connect(f"127.0.0.1:{listener.getsockname()[1]}", ONE_MLX))
    assert refused.value.param == "ray_address"
    assert refused.value.message == (
        "--ray-address needs Ray, which is not installed: pip install 'rollout-server[ray]', here and on every node of "
        "the cluster."
    )


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_frames_come_out_whole_and_in_order_however_they_are_cut(step: int) -> None:
    bodies = [(b"", b""), (b"a", b""), (b"bc" * 3, b"e"), (b"", b""), (b"d" * 40, b"f" * 30)]
    stream = b"".join(LENGTHS.pack(len(head), len(arrays)) + head + arrays for head, arrays in bodies)
    came, found = bytearray(), []
    for at in range(0, len(stream), step):
        came += stream[at : at + step]
        found += take_whole(came)
    assert found == bodies and not came
