"""`push` of a model that is being trained: the server samples exactly what the model itself computes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from safetensors.numpy import save

from tests.support import tiny_models
from tests.support.live_server import Server, server_here
from tests.support.numbers.bounds import TINY
from trainer_client import RolloutClient

PROMPTS = [[5, 9, 33], [100, 20, 7, 8, 9, 10, 11, 250], [44]]


@pytest.fixture(scope="module", params=["qwen3", "qwen3_moe"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build(request.param, tmp_path_factory.mktemp("live") / request.param)


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with server_here(model) as live:
        yield live


def trained(model: Path, seed: int, dora: bool = False, keys: list[str] | None = None) -> Any:
    """The model as a trainer has it, with adapters that do something."""
    loaded = mlx_lm.load(str(model))[0]
    loaded.set_dtype(mx.float32)
    loaded.freeze()
    mx.random.seed(seed)
    lora: dict[str, Any] = {"rank": 4, "scale": 2.0, "dropout": 0.0}
    linear_to_lora_layers(loaded, len(loaded.layers), lora | ({"keys": keys} if keys else {}), use_dora=dora)
    shake(loaded)
    return loaded


def shake(model: nn.Module) -> None:
    for path, layer in model.named_modules():
        if hasattr(layer, "lora_b"):
            layer.lora_b = 0.1 * mx.random.normal(layer.lora_b.shape)
            if "m" in layer:
                layer.m = layer.m * 1.5
            assert path
    mx.eval(model.parameters())


def farthest(model: nn.Module, client: RolloutClient, policy: str) -> float:
    """Largest difference between the server's log-probabilities and the model's own, in what rounding may do."""
    batch = client.rollouts(PROMPTS, policy=policy, n=2, max_tokens=8, ignore_eos=True, seed=3, returns=())
    gaps = []
    for row in batch:
        ids = np.concatenate([row.prompt_token_ids, row.token_ids])
        logits = model(mx.array(ids)[None])[0, len(row.prompt_token_ids) - 1 : -1].astype(mx.float32)
        own = mx.take_along_axis(logits - mx.logsumexp(logits, -1, keepdims=True), mx.array(row.token_ids)[:, None], -1)
        gaps.append(np.abs(np.array(own)[:, 0] - row.logprobs).max())
    return float(max(gaps)) / TINY.of_batch(batch)


def test_a_model_with_lora_layers_is_pushed_as_it_computes(server: Server, model: Path) -> None:
    moe = model.name == "qwen3_moe"
    # mlx-lm has no DoRA on stacked experts
    kinds = {"lora": trained(model, 1), "dora": trained(model, 2, dora=True, keys=["self_attn.q_proj"])}
    if not moe:
        uneven = trained(model, 3)
        first = uneven.layers[0].self_attn
        first.q_proj.scale = 0.7
        first.k_proj.lora_a, first.k_proj.lora_b = first.k_proj.lora_a[:, :3], first.k_proj.lora_b[:3]
        kinds["uneven"] = uneven
    with RolloutClient(server.url) as client:
        for name, own in kinds.items():
            version = client.push(name, own)
            assert version.verified and version.kind == ("dora" if name == "dora" else "lora")
            assert farthest(own, client, name) <= 1
            assert farthest(own, client, "base") > 100
            assert client.push(name, own).unchanged
        named = dict(tree_flatten(kinds["lora"].trainable_parameters()))
        blocks = len(kinds["lora"].layers)
        config = {"num_layers": blocks, "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0}}
        assert client.push("lora", named, config).unchanged


def test_an_embedding_is_pushed_with_the_head_that_shares_it(server: Server, model: Path) -> None:
    own = trained(model, 4, keys=["model.embed_tokens", "self_attn.v_proj"])
    with RolloutClient(server.url) as client:
        client.push("table", own)
        assert farthest(own, client, "table") <= 1


def test_a_skipped_push_uploads_nothing_and_never_hides_a_change(server: Server, model: Path) -> None:
    def uploads() -> float:
        name = 'rollout_push_seconds_count{model="base",phase="receive"}'
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        return next((float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name)), 0.0)

    own, other = trained(model, 5, keys=["self_attn.q_proj"]), trained(model, 6, keys=["self_attn.q_proj"])
    with RolloutClient(server.url) as client, RolloutClient(server.url) as rival:
        first = client.push("mine", own)
        before = uploads()
        again = client.push("mine", own)
        assert (again.version, again.digest, again.unchanged, again.live) == (1, first.digest, True, True)
        assert uploads() == before
        # another client moves the name: the same weights are not live any more, and are sent
        assert rival.push("mine", other).version == 2
        third = client.push("mine", own)
        assert (third.version, third.unchanged, third.live, uploads()) == (3, False, True, before + 2)
        # rolled back by the rival: the newest is made live again without its bytes
        rival.activate("mine", 2)
        back = client.push("mine", own)
        assert (back.version, back.unchanged, back.live, uploads()) == (3, True, True, before + 2)
        assert client.policy("mine").live == 3
        # one value differs
        own.layers[0].self_attn.q_proj.lora_b[0, 0] += 1e-6
        assert client.push("mine", own).version == 4
        rival.delete_policy("mine")
        assert client.push("mine", own).version == 5
        labelled = client.push("mine", own, label="step-9")
        assert (labelled.version, labelled.unchanged, labelled.label) == (5, True, "step-9")
        assert client.policy("mine").versions[-1].label == "step-9"


def test_arrays_of_float64_are_the_version_of_their_float32(server: Server, model: Path) -> None:
    """Sent by the client, which casts them; sent as they are, they are refused in a sentence."""
    with RolloutClient(server.url) as client:
        version = client.push("wide", trained(model, 9, keys=["self_attn.q_proj", "self_attn.v_proj"]))
        exported = client.export("wide", version.version)
        wide = {name: tensor.array.astype(np.float64) for name, tensor in exported.tensors.items()}
        with pytest.warns(UserWarning, match="float64"):
            again = client.push("wide", wide, exported.config)
        assert again.unchanged and again.verified and again.digest == version.digest
        client.rollouts(PROMPTS, policy="wide", max_tokens=2).assert_synced(again)
    reply = httpx.post(
        f"{server.url}/v1/weights",
        params={"name": "wide"},
        headers={"content-type": "application/octet-stream"},
        content=save(wide, {"adapter_config": json.dumps(dict(exported.config))}),
    )
    error = reply.json()["error"]
    assert reply.status_code == 422 and len(error["faults"]) == len(wide)
    assert f"{len(wide)} tensors have dtype F64" in error["message"] and len(error["message"]) < 1024
