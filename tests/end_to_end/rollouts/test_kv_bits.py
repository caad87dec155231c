"""`serve --kv-bits 8`: it says so, and its log-probabilities are those of the keys and values it keeps."""

from __future__ import annotations

import numpy as np

from tests.support.live_server import server_here
from trainer_client import RolloutClient


def test_a_server_that_keeps_8_bits_says_so_and_agrees_with_itself() -> None:
    with server_here(None, kv_bits=8) as live, RolloutClient(live.url) as client:
        assert {model.kv_bits for model in client.models()} == {8}
        batch = client.rollouts(["12+30=", "7+5="], n=3, max_tokens=16, seed=1)
        scored = client.logprobs(batch)
        assert len(batch.logprobs) > 6
        np.testing.assert_allclose(scored.logprobs, batch.logprobs, atol=1e-3, rtol=0)
