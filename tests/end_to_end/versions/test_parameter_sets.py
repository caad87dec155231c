"""Merged and dense versions through a real process, over a restart, and on a quantised base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from safetensors.numpy import load_file, save

from tests.support import tiny_models
from tests.support.live_server import Server, engines, live_server, server_here, uncut
from tests.support.numbers.bounds import TINY, assert_near
from trainer_client import RolloutClient, adapter_digest
from trainer_client.adapter.tensors import host_tensors

pytestmark = uncut("merged versions and whole tensors")
PROMPTS = [[5, 9, 33], [44]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("qwen3", tmp_path_factory.mktemp("live") / "tiny", num_hidden_layers=2)


def post(live: Server, name: str, tensors: Mapping[str, Any], config: Any, **options: str) -> httpx.Response:
    files = {"weights": save(dict(tensors)), "config": json.dumps(config).encode()}
    return httpx.post(f"{live.url}/v1/weights", data={"name": name, **options}, files=files, timeout=60)


def numbers(client: RolloutClient, policy: str) -> tuple[bytes, bytes]:
    batch = client.rollouts(PROMPTS, policy=policy, n=2, max_tokens=8, seed=1)
    return batch.token_ids.tobytes(), batch.logprobs.tobytes()


def gauges(live: Server) -> dict[str, float]:
    lines = httpx.get(f"{live.url}/metrics").raise_for_status().text.splitlines()
    return {name: float(value) for name, value in (li.rsplit(" ", 1) for li in lines if not li.startswith("#"))}


def full(model: Path, seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    weights = load_file(model / "model.safetensors")
    chosen = {name: value for name, value in weights.items() if "norm" in name or "down_proj" in name}
    return {n: (v + 0.1 * random.standard_normal(v.shape)).astype(np.float32) for n, v in chosen.items()}


@pytest.mark.long
def test_a_restart_serves_merged_and_full_versions_as_they_were(model: Path, tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    tensors, config = tiny_models.random_adapter(tiny_models.linear_layers(model), 4, 1, dora=True)
    dense, base = full(model, 2), load_file(model / "model.safetensors")
    with live_server(model, "--state-dir", state) as live, RolloutClient(live.url) as client:
        bare = numbers(client, "base")
        pushed = post(live, "low", tensors, config, mode="merged").json()
        assert (pushed["mode"], pushed["kind"], pushed["rank"]) == ("merged", "dora", 4)
        whole = client.push("whole", dense, {"kind": "full"})
        assert whole.verified and (whole.kind, whole.mode, whole.rank) == ("full", "merged", 0)
        assert whole.report["dense"] == len(dense) and whole.report["delta_norm"] == pytest.approx(
            np.sqrt(sum(np.square(v - base[n], dtype=np.float64).sum() for n, v in dense.items())), rel=1e-5
        )
        assert whole.report["resident_bytes"] == whole.nbytes == sum(v.nbytes for v in dense.values())
        before = {policy: numbers(client, policy) for policy in ("low", "whole")}
        assert len({bare, *before.values()}) == 3 and numbers(client, "base") == bare
        seen = gauges(live)
        assert seen['rollout_parameter_sets{model="base"}'] == 2 * engines()
        nbytes = pushed["report"]["resident_bytes"] + whole.nbytes
        assert seen['rollout_set_bytes{model="base"}'] == nbytes * engines()
        assert seen['rollout_resident_bytes{model="base",policy="whole"}'] == whole.nbytes
        assert live.stop() == 0
    with live_server(model, "--state-dir", state) as live, RolloutClient(live.url) as client:
        assert {policy: numbers(client, policy) for policy in ("low", "whole")} == before
        assert numbers(client, "base") == bare
        versions = httpx.get(f"{live.url}/v1/weights").json()["policies"]
        assert [(p["name"], p["versions"][0]["mode"]) for p in versions] == [("low", "merged"), ("whole", "merged")]
        assert post(live, "low", tensors, config, mode="merged").json()["unchanged"] is True
        again = httpx.get(f"{live.url}/v1/weights/whole/1/export")
        copy = httpx.post(
            f"{live.url}/v1/weights?name=copy",
            content=again.content,
            headers={"content-type": "application/octet-stream"},
        )
        assert copy.json()["digest"] == whole.digest == again.headers["x-policy-digest"]
        assert numbers(client, "copy") == before["whole"]
        assert gauges(live)['rollout_parameter_sets{model="base"}'] == 2 * engines(), "equal contents share one"
        refused = httpx.get(f"{live.url}/v1/weights/whole/1/export?format=peft")
        assert refused.status_code == 409 and "kind full" in refused.json()["error"]["message"]
        exported = client.export("low", 1)
        assert exported.digest == pushed["digest"] and exported.config["peft_type"] == "LORA"
        assert client.export("whole", 1).save(tmp_path / "out") == tmp_path / "out"
        assert client.push("again", tmp_path / "out").digest == whole.digest
        client.export("whole", 1, format="mlx").save(tmp_path / "mlx")
        mlx_lm.load(str(model), adapter_path=str(tmp_path / "mlx"))
        assert client.push("mlx", tmp_path / "mlx").digest == whole.digest


def test_a_delta_is_the_full_version_it_adds_up_to(model: Path) -> None:
    base = load_file(model / "model.safetensors")
    random = np.random.default_rng(3)
    delta = {n: (0.05 * random.standard_normal(v.shape)).astype(np.float32) for n, v in base.items()}
    size = sum(value.nbytes for value in base.values())
    with server_here(model, weights_memory=2 * size) as live, RolloutClient(live.url) as client:
        assert client.push("whole", {n: v + delta[n] for n, v in base.items()}, {"kind": "full"}).nbytes == size
        expected = numbers(client, "whole")
        pushed = post(live, "p", delta, {"kind": "delta"}, label="x").json()
        assert pushed["digest"] == adapter_digest(host_tensors(delta), {"kind": "delta"})
        norm = np.sqrt(sum(np.square(v.astype(np.float64)).sum() for v in delta.values()))
        assert pushed["report"]["delta_norm"] == pytest.approx(norm)
        assert numbers(client, "p") == expected, "to the bit"
        assert gauges(live)['rollout_set_bytes{model="base"}'] == 2 * size * engines()
        refused = post(live, "p", {n: 2 * v for n, v in delta.items()}, {"kind": "delta"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (507, "weights_memory_exceeded")
        assert gauges(live)['rollout_set_bytes{model="base"}'] == 2 * size * engines()
        assert numbers(client, "p") == expected
        wrong = {"model.norm.weight": np.zeros(3, np.float32), "nothing": np.zeros(3, np.float32)}
        said = post(live, "p", wrong, {"kind": "delta"})
        assert said.status_code == 422 and len(said.json()["error"]["faults"]) == 2
        explicit = post(live, "p", delta, {"kind": "delta"}, mode="adapter")
        assert explicit.status_code == 400 and explicit.json()["error"]["param"] == "mode"


def test_a_quantised_base_says_409_until_it_may_unpack(model: Path, tmp_path: Path) -> None:
    packed = load_model(model)[0]
    nn.quantize(packed, group_size=32, bits=4)
    weights = dict(tree_flatten(packed.parameters()))
    path = tiny_models.build("qwen3", tmp_path / "packed", num_hidden_layers=2)
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
    config = json.loads((path / "config.json").read_text())
    config["quantization"] = {"group_size": 32, "bits": 4}
    (path / "config.json").write_text(json.dumps(config))
    tensors, adapter = tiny_models.random_adapter(tiny_models.linear_layers(model), 4, 1, targets=["down_proj"])
    with server_here(path) as live, RolloutClient(live.url) as client:
        refused = post(live, "p", tensors, adapter, mode="merged")
        assert refused.status_code == 409 and refused.json()["error"]["param"] == "dequantize"
        assert httpx.get(f"{live.url}/v1/weights").json()["policies"] == []
        pushed = post(live, "p", tensors, adapter, mode="merged", dequantize="true").json()
        assert pushed["report"]["resident_bytes"] == 2 * 64 * 96 * 4
        client.push("low", tensors, adapter)
        one, two = (client.rollouts(PROMPTS, policy=p, max_tokens=8, seed=1) for p in ("p", "low"))
        assert np.array_equal(one.token_ids, two.token_ids)
        assert_near(one.logprobs, two.logprobs, TINY.of_batch(one))
