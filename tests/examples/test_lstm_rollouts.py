"""The example of a recurrent policy, with a server of its own: its reward rises, and a conversation goes on from states
that the server kept."""

from __future__ import annotations

import random
from pathlib import Path

import httpx
import pytest

from examples.lstm_rollouts import END, make, train
from tests.support.live_server import server_here


@pytest.mark.long
def test_letters_come_to_follow_the_alphabet(tmp_path: Path) -> None:
    random.seed(0)
    with server_here(make(tmp_path / "lstm")) as server:
        rewards = train(server.url, tmp_path / "lstm", 25)
        # One letter of END + 1 is right by chance.
        assert rewards[0] < 3 / (END + 1) and sum(rewards[-3:]) / 3 > 5 * rewards[0] and rewards[-1] > 0.3

        def asked(ids: list[int], policy: str) -> tuple[list[int], int]:
            """The reply's tokens, and how many of the prompt were not read again."""
            body = {
                "policy": policy,
                "prompts": [{"token_ids": ids}],
                "sampling": {"max_tokens": 8, "ignore_eos": True},
            }
            reply = httpx.post(f"{server.url}/v1/rollouts", json=body).raise_for_status().json()
            return reply["rollouts"][0]["token_ids"], reply["usage"]["prompt_tokens_details"]["cached_tokens"]

        first, cached = asked([0] * 40, "writer")
        longer = [0] * 40 + first + [1, 2, 3]
        # Nobody has read the token that was sampled last, and another version has another state.
        assert (cached, asked(longer, "writer")[1], asked(longer, "base")[1]) == (0, 40 + 7, 0)
        text = httpx.get(f"{server.url}/metrics").text.replace('{model="base"}', "")
        metrics = {line.split()[0]: line.split()[-1] for line in text.splitlines()}
        assert float(metrics["rollout_prefix_bytes"]) > 0 and float(metrics["rollout_prefix_cache"]) == 1
        assert float(metrics["rollout_prefix_hit_tokens_total"]) >= 40 + 7
