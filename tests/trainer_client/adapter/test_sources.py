"""Pushes of kinds `delta` and `full`: the server serves them merged, and the client knows that."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.trainer_client.test_client import both, kept, line, scripted
from trainer_client.adapter.digest import adapter_digest
from trainer_client.adapter.tensors import host_tensors


@both
@pytest.mark.parametrize("config", [{"kind": "delta"}, {"kind": "full"}, {"fine_tune_type": "full", "num_layers": -1}])
def test_whole_tensors_are_not_sent_again(ask: Any, config: dict[str, Any]) -> None:
    tensors = {"model.norm.weight": np.ones(8, "f4")}
    digest = adapter_digest(host_tensors(tensors), config)
    with scripted(line(kept(7, digest, live=True, mode="merged"))) as seen:
        assert ask(seen.url, "push", "policy", tensors, config).unchanged
    assert [method for method, *_ in seen.requests] == ["GET"]
