"""Adapters on the token embedding and on the head that may share its weight."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.nn.layers.distributed import shard_linear
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

from adapters.bundle import AdapterBundle
from adapters.errors import AdapterDoesNotFit, AdapterUnsupported
from adapters.formats import mlx_lm, peft
from adapters.formats.read import read_bundle
from adapters.resident import dora_norms
from adapters.resident.layers.embedding import AdaptedEmbedding
from adapters.resident.model_layers import adaptable_layers
from adapters.resident.slots import AdapterSlots
from adapters.spec import EmbeddingShape, TiedEmbeddingShape, TiedHeadShape
from tests.support import tiny_models
from tests.support.adapter_files import adapted, file_of, logits, make, merge, tokens
from tests.support.numbers.bounds import assert_near, relative
from tests.support.tiny_models import random_adapter, save_adapter
from trainer_client.adapter.digest import adapter_digest
from trainer_client.adapter.tensors import host_tensors

Load = Callable[[], nn.Module]
EMBED = "model.embed_tokens"


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Load:
    directory = tiny_models.build("qwen3", tmp_path_factory.mktemp("models"), num_hidden_layers=2)
    return lambda: load_model(directory)[0]


def slots_for(model: nn.Module, dtype: mx.Dtype = mx.float32) -> AdapterSlots:
    return AdapterSlots(model, adaptable_layers(model), dtype)


def quantise(model: nn.Module, bits: int) -> nn.Module:
    nn.quantize(model, group_size=32, bits=bits)
    return model


# ---- what is found ------------------------------------------------------------------------------------------------


def test_the_embedding_is_found_and_whether_the_head_shares_it(load: Load, tied: Load) -> None:
    assert adaptable_layers(load())[EMBED] == EmbeddingShape(64, 320)
    assert type(adaptable_layers(load())[EMBED]) is EmbeddingShape
    for model in (tied(), quantise(tied(), 4)):
        found = adaptable_layers(model)
        assert type(found[EMBED]) is TiedEmbeddingShape and found[EMBED] == (64, 320)
        assert type(found["lm_head"]) is TiedHeadShape and found["lm_head"] == (320, 64)
        assert isinstance(model.model.embed_tokens, nn.Embedding | nn.QuantizedEmbedding), "put back after the watching"


@pytest.mark.parametrize("bits", [None, 4])
def test_a_layer_that_is_cut_over_ranks_has_the_shape_of_the_whole(load: Load, bits: int | None) -> None:
    """mlx's sharded layers are no `nn.Linear`; a group of two is all that they are asked for here."""

    class Two:
        def size(self) -> int:
            return 2

        def rank(self) -> int:
            return 0

    model = quantise(load(), bits) if bits else load()
    whole, layer = adaptable_layers(model), model.model.layers[0]
    group: Any = Two()
    rank = nn.Module()
    rank.outputs = shard_linear(layer.self_attn.q_proj, "all-to-sharded", group=group)
    rank.inputs = shard_linear(layer.self_attn.q_proj, "sharded-to-all", group=group)
    assert rank.outputs.weight.size * 2 == layer.self_attn.q_proj.weight.size
    assert adaptable_layers(rank) == {
        "outputs": whole["model.layers.0.self_attn.q_proj"],
        "inputs": whole["model.layers.0.self_attn.q_proj"],
    }


def test_a_model_that_reads_the_weight_itself_has_no_adaptable_embedding(tied: Load) -> None:
    class Past(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tied()

        def __call__(self, x: mx.array) -> mx.array:
            hidden = self.inner.model(x)
            return hidden @ self.inner.model.embed_tokens.weight.T

    model = Past()
    embedding = model.inner.model.embed_tokens
    assert not any("embed" in path for path in adaptable_layers(model))
    assert model.inner.model.embed_tokens is embedding


# ---- the forward --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head", "q_proj"]])
@pytest.mark.parametrize("which", ["load", "tied"])
def test_it_equals_the_definition(which: str, targets: list[str], dora: bool, request: Any) -> None:
    load: Load = request.getfixturevalue(which)
    model, text = load(), tokens(3)
    layers, plain = adaptable_layers(model), logits(model, text)
    bundle = make(layers, targets=targets, dora=dora)
    merged = logits(merge(load(), bundle), text)
    assert np.abs(merged - plain).max() > 0.1
    slots = slots_for(model)
    slot = slots.stage(bundle)
    slots.route([slot] * 3)
    assert_near(logits(model, text), merged)
    slots.route([slot, 0, slot])
    mixed = logits(model, text)
    assert_near(mixed[[0, 2]], merged[[0, 2]])
    assert np.array_equal(mixed[1], plain[1])


def test_one_half_of_a_tied_weight_leaves_the_other_alone(tied: Load) -> None:
    model = tied()
    slots = slots_for(model)
    slots.route([slots.stage(make(adaptable_layers(model), targets=["embed_tokens"]))])
    x = mx.random.normal((1, 2, 64))
    assert mx.array_equal(model.model.embed_tokens.as_linear(x), tied().model.embed_tokens.as_linear(x)).item()


def test_rows_of_every_kind_share_a_batch(tied: Load) -> None:
    layers, text = adaptable_layers(tied()), tokens(6)
    bundles = [
        make(layers, 1, rank=3, targets=["embed_tokens"]),
        make(layers, 2, rank=9, targets=["lm_head", "embed_tokens", "up_proj"], dora=True),
        make(layers, 3, rank=2),
    ]
    model = tied()
    slots = slots_for(model)
    staged = [0, *(slots.stage(bundle) for bundle in bundles)]
    order = [2, 1, 0, 3, 1, 2]
    slots.route([staged[i] for i in order])
    mixed = logits(model, text)
    models = [tied(), *(merge(tied(), bundle) for bundle in bundles)]
    for row, which in enumerate(order):
        assert_near(mixed[row], logits(models[which], text[row : row + 1])[0], says=f"row {row}")


@pytest.mark.parametrize("quantisation", [None, 4, 8])
@pytest.mark.parametrize("which", ["load", "tied"])
def test_it_is_what_mlx_lm_computes(which: str, quantisation: int | None, request: Any, tmp_path: Path) -> None:
    """Where the head shares the embedding's weight, mlx-lm adapts both."""
    load: Load = request.getfixturevalue(which)
    fresh = load if quantisation is None else lambda: quantise(load(), quantisation)
    model, text = fresh(), tokens(2)
    layers = adaptable_layers(model)
    tensors, config = random_adapter(layers, 4, 3, 1.5, "mlx", targets=["embed_tokens", "v_proj"], strength=0.05)
    theirs = load_adapters(fresh(), str(save_adapter(tmp_path, tensors, config)))
    theirs.eval()
    slots = slots_for(model)
    bundle = read_bundle(file_of(tensors), config, layers=layers)
    assert ("lm_head" in bundle.spec.modules) == (which == "tied")
    slot = slots.stage(bundle)
    expected = logits(theirs, text)
    for route in ([slot, slot], [slot, 0]):
        slots.route(route)
        assert_near(logits(model, text)[0], expected[0])
    assert np.abs(expected - logits(fresh(), text)).max() > 0.01


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("quantised", [False, True])
def test_nothing_is_promoted(tied: Load, dtype: mx.Dtype, quantised: bool) -> None:
    model = tied()
    model.set_dtype(dtype)
    if quantised:
        quantise(model, 4)
    slots = slots_for(model, dtype)
    slot = slots.stage(make(adaptable_layers(model), targets=["embed_tokens", "lm_head"], dora=True))
    for route in ([slot] * 2, [slot, 0]):
        slots.route(route)
        assert model.model.embed_tokens(mx.array(tokens(2))).dtype == dtype
        assert model(mx.array(tokens(2))).dtype == dtype


def test_wrapping_adds_no_parameters_and_unmounting_restores_the_object(tied: Load) -> None:
    from mlx.utils import tree_flatten

    model, text = tied(), tokens(2)
    embedding, layers, plain = model.model.embed_tokens, adaptable_layers(model), logits(model, text)
    names = {name for name, _ in tree_flatten(model.parameters())}
    slots = slots_for(model)
    slots.route([slots.stage(make(layers, targets=["embed_tokens", "lm_head"]))] * 2)
    assert isinstance(model.model.embed_tokens, AdaptedEmbedding)
    assert {name.replace(".base.", ".") for name, _ in tree_flatten(model.parameters())} == names
    found = adaptable_layers(model)
    assert found == layers and {p: type(s) for p, s in found.items()} == {p: type(s) for p, s in layers.items()}
    slots.unmount()
    assert model.model.embed_tokens is embedding and np.array_equal(logits(model, text), plain)


def test_norms_of_a_transposed_table_come_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dora_norms, "BLOCK_VALUES", 16 * 7)
    random = np.random.default_rng(0)
    table = random.normal(size=(45, 16)).astype(np.float32)
    layer = nn.Embedding(45, 16)
    layer.weight = mx.array(table)
    a, b = random.normal(size=(3, 45)).astype(np.float32), random.normal(size=(16, 3)).astype(np.float32)
    a[0], b[5] = table[:, 5], (-1 / 0.7, 0, 0)  # One column is cancelled.
    expected = np.linalg.norm(table.T.astype(np.float64) + 0.7 * (b.astype(float) @ a), axis=1)
    given = adapted(dora_norms.RowNorms(), dora_norms.TableRows(layer), a, b, 0.7)
    np.testing.assert_allclose(given, expected, rtol=relative(45), atol=relative(45) * np.linalg.norm(table))


# ---- the files ----------------------------------------------------------------------------------------------------


def read(model: nn.Module, kind: Any, targets: list[str], **options: Any) -> AdapterBundle:
    layers = adaptable_layers(model)
    tensors, config = random_adapter(layers, 4, 1, kind=kind, targets=targets, **options)
    return read_bundle(file_of(tensors), config, layers=layers)


def test_all_linear_leaves_them_out(tied: Load) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
    modules = peft.read({}, config, adaptable_layers(tied()), {}).spec.modules
    assert modules and all("layers" in path for path in modules)


def test_a_digest_does_not_depend_on_the_format(load: Load) -> None:
    digests = {read(load(), kind, ["embed_tokens", "q_proj"]).digest for kind in ("peft", "mlx")}
    assert len(digests) == 1


def test_the_client_computes_the_same_where_it_can(tied: Load) -> None:
    layers = adaptable_layers(tied())
    for dora in (False, True):
        tensors, config = random_adapter(layers, 4, 1, targets=["embed_tokens", "lm_head", "q_proj"], dora=dora)
        bundle = read_bundle(file_of(tensors), config, layers=layers)
        assert adapter_digest(host_tensors(tensors), config) == bundle.digest
    tensors, config = random_adapter(layers, 4, 1, kind="mlx", targets=["embed_tokens"])
    assert adapter_digest(host_tensors(tensors), config) is None, "only the server knows whether the head follows"


@pytest.mark.parametrize("dora", [False, True])
def test_what_peft_is_given_reads_back(tied: Load, dora: bool) -> None:
    bundle = read(tied(), "peft", ["embed_tokens", "lm_head", "q_proj"], dora=dora)
    weights, config = peft.write(bundle)
    assert b"embed_tokens.lora_embedding_A" in weights and b"lm_head.lora_A.weight" in weights
    again = read_bundle(weights, json.loads(json.dumps(config)), layers=adaptable_layers(tied()))
    assert again.digest == bundle.digest


def test_what_mlx_lm_is_given_reads_back(load: Load, tied: Load) -> None:
    for model in (load(), tied()):
        bundle = read(model, "mlx", ["embed_tokens", "q_proj"])
        weights, config = mlx_lm.write(bundle)
        assert read_bundle(weights, config, layers=adaptable_layers(model)).digest == bundle.digest


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_what_mlx_lm_cannot_say_of_a_tied_weight_is_refused(tied: Load, targets: list[str]) -> None:
    with pytest.raises(AdapterUnsupported, match="together"):
        mlx_lm.write(read(tied(), "peft", targets))


def test_dora_on_embeddings_in_the_form_of_mlx_lm_is_refused(load: Load) -> None:
    with pytest.raises(AdapterUnsupported, match="a magnitude for every token") as caught:
        read(load(), "mlx", ["embed_tokens"], dora=True)
    assert caught.value.fields == ("fine_tune_type",)
    with pytest.raises(AdapterUnsupported, match="use peft"):
        mlx_lm.write(read(load(), "peft", ["embed_tokens"], dora=True))


def test_faults_are_told_in_the_files_words(load: Load) -> None:
    layers = adaptable_layers(load())
    tensors, config = random_adapter(layers, 4, 1, targets=["embed_tokens"])
    prefix = f"base_model.model.{EMBED}"
    del tensors[f"{prefix}.lora_embedding_B"]
    tensors[f"{prefix}.lora_embedding_A"] = tensors[f"{prefix}.lora_embedding_A"].T.copy()
    tensors["base_model.model.lm_head.base_layer.weight"] = np.zeros((320, 64), np.float32)
    with pytest.raises(AdapterDoesNotFit) as caught:
        read_bundle(file_of(tensors), config, layers=layers)
    assert list(caught.value.faults) == [
        "base_model.model.lm_head.base_layer.weight is unexpected: it is the base's own weight of a layer that the "
        "configuration does not target.",
        f"{EMBED}.lora_embedding_B is missing: the file has only {EMBED}.lora_embedding_A.",
        f"{prefix}.lora_embedding_A has shape [320, 4] but must be [4, 320]: it looks transposed.",
    ]
