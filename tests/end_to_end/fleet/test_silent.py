"""A joined replica that is stopped: its process is there and its link is open, and it says nothing."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import tiny_models
from tests.support.fleet.machines import Machine, controller, replica
from tests.support.live_server import START_S, until
from trainer_client import RolloutClient
from trainer_client.data.batch import RolloutBatch

SILENT = ("ROLLOUT_REPLICA_TIMEOUT_S", "10")
PROMPTS = [[5, 9, 33], [44], list(range(1, 40))]
SAMPLES = 8


def asked(client: RolloutClient, policy: str = "policy", tokens: int = 300) -> RolloutBatch:
    options = {"n": SAMPLES, "max_tokens": tokens, "seed": 3, "temperature": 1.0, "ignore_eos": True}
    return client.rollouts(PROMPTS, policy=policy, **options)


def drawn(batch: RolloutBatch) -> list[tuple[int, int, list[int]]]:
    return [(row.prompt_index, row.sample_index, row.token_ids.tolist()) for row in batch.rollouts]


def states(client: RolloutClient) -> dict[str, str]:
    """By the ends of their ids, which are those of processes."""
    return {each.id.rpartition("-")[2]: each.state for each in client.fleet()}


def of(machine: Machine) -> str:
    return str(machine.process.pid)


@pytest.mark.long
def test_rows_of_a_stopped_replica_come_from_another_and_it_says_nothing_stale_when_it_wakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(*SILENT)
    model = tiny_models.build("qwen3", tmp_path / "tiny")
    layers = tiny_models.linear_layers(model)
    with (
        controller(model, tmp_path / "state") as fleet,
        replica(model, fleet.url) as stopped,
        replica(model, fleet.url) as other,
        RolloutClient(fleet.url) as client,
        ThreadPoolExecutor(1) as beside,
    ):
        until(lambda: stopped.said("has joined") and other.said("has joined"), START_S)
        until(lambda: set(states(client).values()) == {"live"})
        client.push("policy", *tiny_models.random_adapter(layers, 4, 1))
        expected = drawn(asked(client))
        assert len(expected) == len(PROMPTS) * SAMPLES
        under_way = beside.submit(asked, client)
        until(lambda: all(each.rows for each in client.fleet()))
        stopped.process.send_signal(signal.SIGSTOP)
        assert drawn(under_way.result()) == expected, "each row once, with the tokens that it would have had"
        until(lambda: states(client) == {of(stopped): "dead", of(other): "live"})
        assert stopped.process.poll() is None and fleet.said("its engine did not answer for 10 s")
        pushed = client.push("policy", *tiny_models.random_adapter(layers, 4, 2))
        assert pushed.version == 2, "a push waits for nobody who is out"
        later = beside.submit(asked, client)
        stopped.process.send_signal(signal.SIGCONT)
        later.result().assert_synced(pushed)
        stopped.wait_for("The link to .* has closed; what it was for ends here")
        until(lambda: states(client) == {of(stopped): "live", of(other): "live"})
        assert fleet.said(f"-{of(stopped)} has policy@1 already") and not fleet.said("has policy@2 already")
        assert {each.versions_staged for each in client.fleet()} == {2}
        for _ in range(4):
            asked(client, tokens=8).assert_synced(pushed)
        assert drawn(asked(client, "policy@1")) == expected
