"""`--ray-address` without Ray, which most servers do without."""

from __future__ import annotations

import asyncio
import socket
import sys

import pytest

from rollout_server.errors import InvalidField
from rollout_server.fleet.ray.cluster import ONE_MLX, connect


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
