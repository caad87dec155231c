"""A sequence's vector is what a plain forward of the whole sequence gives, under any version, in any batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest

from rollout_server.engine.messages.control import Pause, Resume
from rollout_server.engine.messages.options import Embedding
from rollout_server.engine.model.embedding import find_trunk, read_embedding
from rollout_server.engine.model.resident import ResidentModel
from rollout_server.engine.scoring.batched import BatchedReader
from rollout_server.errors import EngineUnavailable, NonFiniteLogits, UnknownPolicy
from tests.support import tiny_models
from tests.support.engine.driver import Driver, prompts_of
from tests.support.numbers.bounds import TINY, assert_near

LENGTHS = [1, 2, 3, 17, 33, 64, 130]
KINDS = ["last", "mean"]


def pooled_by(model: ResidentModel, kind: str) -> ResidentModel:
    return replace(model, info=replace(model.info, embedding=replace(model.info.embedding, pooling=kind)))


def plain(trunk: nn.Module, sequences: list[list[int]], kind: str) -> np.ndarray:
    """The slow, obvious way: one forward of mlx-lm's own class for each sequence."""
    states = [np.array(trunk(mx.array([tokens])).astype(mx.float32))[0] for tokens in sequences]
    return np.stack([each[-1] if kind == "last" else each.mean(axis=0) for each in states])


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert_near(found, expected, TINY.of_logits(expected, max(LENGTHS)))


# One for each kind of cache: slots, with windows, with experts; one row at a time; recurrent.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "gpt_oss", "gemma2", "mamba2"])
def test_a_vector_is_that_of_a_plain_forward(
    family: str, kind: str, bare_model: Callable[[str], ResidentModel], model_path: Callable[[str], Path]
) -> None:
    model = bare_model(family)
    assert (model.info.embedding.refusal, model.info.embedding.width) == ("", 64)
    driver = Driver.start(model_path(family), pooled_by(model, kind), prefill_tokens=50)
    sequences = prompts_of(LENGTHS, model.info.vocab_size)
    trunk = model.module.backbone if family == "mamba2" else model.module.model
    assert_close(driver.embed(sequences), plain(trunk, sequences, kind))
    assert driver.scoring.cells == 0


def test_every_version_embeds_as_itself_in_one_batch(driver: Driver, qwen: Path) -> None:
    sequences = prompts_of([40, 7], 286)
    expected, options = {}, {"slot": {}, "merged": {"mode": "merged"}}
    for seed, (name, how) in enumerate(options.items()):
        driver.push(name, driver.bundle(seed), **how)
        expected[name] = plain(adapted(qwen, driver, seed).model, sequences, "last")
    expected["base"] = plain(mlx_lm.load(str(qwen))[0].model, sequences, "last")
    ids = {name: driver.ask_embed(sequences, name) for name in expected}
    scored = driver.ask_score(sequences, policy="slot")
    rows = driver.submit(sequences, policy="slot", max_tokens=6)
    for name, vectors in expected.items():
        assert_close(driver.embedded(ids[name]), vectors)
    assert len(driver.scored(scored)) == 2
    driver.finish(rows)
    assert np.abs(expected["slot"] - expected["base"]).max() > 0.1
    assert all(v.rows_in_use == 0 for policy in driver.status.policies for v in policy.versions)


def adapted(directory: Path, driver: Driver, seed: int) -> Any:
    """mlx-lm's model with `driver.bundle(seed)` added to its matrices."""
    model, _ = mlx_lm.load(str(directory))
    tensors, config = tiny_models.random_adapter(driver.model.info.layers, 4, seed)
    modules = dict(model.named_modules())
    for name in [name for name in tensors if name.endswith("lora_A.weight")]:
        layer = modules[name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")]
        a, b = tensors[name], tensors[name.replace("lora_A", "lora_B")]
        layer.weight = layer.weight + mx.array(config["lora_alpha"] / config["r"] * (b @ a))
    return model


def test_embeddings_share_a_forward_and_the_turn(base: Driver, qwen: Path) -> None:
    driver = Driver.start(qwen, base.model, prefill_tokens=48)
    assert isinstance(driver.reader, BatchedReader)
    seen: list[Any] = []

    def noting(hidden: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def noted(ids: mx.array, caches: list[Any]) -> mx.array:
            seen.append(ids.shape)
            return hidden(ids, caches)

        return noted

    driver.read_by(noting, hidden=True)
    # It is read in more turns than the rows have tokens, and they get one in each of them.
    (prompt, long) = prompts_of([20, 48 * 30], 286)
    expected = base.generate([prompt], n=2, seed=3, max_tokens=20, ignore_eos=True)
    rows = driver.submit([prompt], n=2, seed=3, max_tokens=20, ignore_eos=True)
    driver.until(lambda: driver.status.running == 2)
    id = driver.ask_embed([long])
    driver.finish(rows)
    assert not any(event.id == id for event in driver.events), "the rows did not wait for it"
    assert [row.token_ids for row in driver.rollouts(rows)] == [row.token_ids for row in expected]
    assert driver.embedded(id).shape == (1, 64)
    driver.embed(prompts_of([30] * 6, 286))
    assert max(count for count, _ in seen) > 1 and all(length == 1 for _, length in seen), (
        "only last inputs give states"
    )


def test_what_cannot_be_embedded_holds_nothing(driver: Driver) -> None:
    driver.push("wild", driver.bundle(1, strength=1e25))
    sequences = prompts_of([30, 500], 286)
    with pytest.raises(NonFiniteLogits, match="wild@1"):
        driver.embed(sequences[:1], "wild")
    with pytest.raises(UnknownPolicy):
        driver.embed(sequences, "nobody")
    driver.push("calm", driver.bundle(1))
    id = driver.ask_embed(sequences * 3, "calm")
    driver.turn()
    assert driver.status.policies[0].versions[0].rows_in_use == 1
    driver.abort(id, "disconnect")
    with pytest.raises(EngineUnavailable, match="disconnect"):
        driver.embedded(id)
    assert all(v.rows_in_use == 0 for policy in driver.status.policies for v in policy.versions)
    assert np.isfinite(driver.embed(sequences)).all()


def test_it_waits_while_paused_and_ends_with_the_engine(base: Driver) -> None:
    base.send(Pause("pause", "wait"))
    id, other = (base.ask_embed([[1, 2, 3]]) for _ in range(2))
    base.turn(5)
    assert not any(event.id in (id, other) for event in base.events)
    base.abort(other, "disconnect")
    base.turn()
    assert "disconnect" in str(base.error(other))
    base.send(Resume("resume"))
    assert base.embedded(id).shape == (1, 64)
    last = base.ask_embed(prompts_of([900] * 3, 286))
    base.turn()
    base.engine.stop()
    assert "stopping" in str(base.error(last))


# ---- what a model directory says ------------------------------------------------------------------------------------


def write(directory: Path, modules: list[str] | None, **pooling: Any) -> Path:
    if modules is not None:
        entries = [
            {"idx": at, "name": str(at), "path": f"{at}_{name}", "type": f"sentence_transformers.models.{name}"}
            for at, name in enumerate(modules)
        ]
        (directory / "modules.json").write_text(json.dumps(entries))
    if pooling:
        (directory / "1_Pooling").mkdir()
        (directory / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 8, **pooling}))
    return directory


@pytest.mark.parametrize(
    ("modules", "pooling", "expected"),
    [
        (None, {}, ("last", True)),
        (None, {"pooling_mode_mean_tokens": True}, ("mean", True)),
        (["Transformer", "Pooling"], {"pooling_mode_lasttoken": True, "include_prompt": True}, ("last", False)),
        (["Transformer", "Pooling", "Normalize"], {"pooling_mode_lasttoken": True}, ("last", True)),
        (["Transformer", "Pooling", "Normalize"], {"pooling_mode": "mean"}, ("mean", True)),
        (["Transformer", "Pooling", "Normalize"], {"pooling_mode": ["lasttoken"]}, ("last", True)),
    ],
)
def test_sentence_files_are_followed(
    modules: list[str] | None, pooling: dict[str, Any], expected: tuple[str, bool], tmp_path: Path
) -> None:
    found = read_embedding(write(tmp_path, modules, **pooling), {}, 8)
    assert found == Embedding(*expected, 8, "")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("modules", "pooling", "config", "says"),
    [
        (["Transformer", "Pooling", "Dense"], {"pooling_mode_mean_tokens": True}, {}, "Dense"),
        (None, {"pooling_mode_cls_token": True}, {}, "pooled by cls"),
        (None, {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, {}, "mean and max"),
        (None, {}, {"use_bidirectional_attention": True}, "both directions"),
        (None, {}, {"text_config": {"is_causal": False}}, "both directions"),
    ],
)
def test_what_they_ask_for_in_vain_is_named(
    modules: list[str] | None, pooling: dict[str, Any], config: dict[str, Any], says: str, tmp_path: Path
) -> None:
    assert says in read_embedding(write(tmp_path, modules, **pooling), config, 8).refusal


def test_broken_sentence_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("{")
    assert "cannot be read" in read_embedding(tmp_path, {}, 8).refusal


class NormsLast(nn.Module):
    """A model whose final norm stands beside its trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.norm = nn.Linear(8, 8), nn.RMSNorm(8)


def test_a_model_without_hidden_states_to_be_found_has_none() -> None:
    assert find_trunk(NormsLast(), 320) is None
    assert find_trunk(nn.Linear(8, 8), 320) is None
