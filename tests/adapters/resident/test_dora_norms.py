"""DoRA: the gain against its definition in float64, mlx-lm's own layers as oracle, and every kind in one batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

from adapters.errors import AdapterDoesNotFit
from adapters.formats import mlx_lm, peft
from adapters.formats.read import read_bundle
from adapters.numerics import squared_delta_norms, squared_row_norms
from adapters.prepare import HostDelta
from adapters.resident import dora_norms
from adapters.resident.dora_norms import AdaptedRows, RowNorms, Rows
from adapters.resident.model_layers import adaptable_layers
from adapters.resident.slots import AdapterSlots
from tests.support import tiny_models
from tests.support.adapter_files import Layers, adapted, file_of, logits, make, merge, tokens
from tests.support.numbers.bounds import assert_near, relative
from tests.support.tiny_models import random_adapter, save_adapter

Load = Callable[[], nn.Module]
QUANTISED = [("affine", bits) for bits in (2, 3, 4, 5, 6, 8)] + [("mxfp4", 4)]


def slots_for(model: nn.Module, dtype: mx.Dtype = mx.float32) -> AdapterSlots:
    return AdapterSlots(model, adaptable_layers(model), dtype)


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """A llama whose attention layers have biases."""
    directory = tiny_models.build("llama", tmp_path_factory.mktemp("models"), num_hidden_layers=2)
    return lambda: load_model(directory)[0]


def quantise(model: nn.Module, mode: str, bits: int) -> nn.Module:
    nn.quantize(model, group_size=32, bits=bits, mode=mode, class_predicate=lambda _, m: isinstance(m, nn.Linear))
    return model


def dequantised(model: nn.Module) -> nn.Module:
    """Plain layers with the values that the quantised ones stand for."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.QuantizedLinear):
            plain = nn.Linear(1, 1, bias=False)
            plain.weight = mx.dequantize(
                layer.weight, layer.scales, layer.biases, layer.group_size, layer.bits, layer.mode, dtype=mx.float32
            )
            if "bias" in layer:
                plain.bias = layer.bias
            parent: object = model
            *parts, name = path.split(".")
            for part in parts:
                parent = parent[int(part) if part.isdigit() else part]  # type: ignore[index]
            parent[name] = plain  # type: ignore[index]
    return model


# ---- the gain -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quantisation", "dtype"), [(None, mx.float32), (None, mx.bfloat16), *(
    (q, mx.float32) for q in QUANTISED), (("affine", 4), mx.bfloat16), (("mxfp4", 4), mx.bfloat16)])  # fmt: skip
def test_row_norms_are_those_of_the_definition(
    quantisation: tuple[str, int] | None, dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dora_norms, "BLOCK_VALUES", 96 * 5)  # Several blocks, the last one short.
    random = np.random.default_rng(0)
    layer = nn.Linear(96, 33)
    layer.weight = mx.array(random.normal(size=(33, 96)).astype(np.float32)).astype(dtype)
    weight = layer.weight.astype(mx.float32)
    if quantisation is not None:
        mode, bits = quantisation
        layer = nn.QuantizedLinear.from_linear(layer, 32, bits, mode)
        scales = layer.scales.astype(mx.float32) if layer.biases is not None else layer.scales
        biases = None if layer.biases is None else layer.biases.astype(mx.float32)
        weight = mx.dequantize(layer.weight, scales, biases, 32, bits, mode, dtype=mx.float32)
    a, b = random.normal(size=(3, 96)).astype(np.float32), random.normal(size=(33, 3)).astype(np.float32)
    row_norms = RowNorms()
    for scale in (0.7, -1.3):  # The second time from the cache.
        expected = np.linalg.norm(np.array(weight).astype(np.float64) + scale * (b.astype(float) @ a), axis=1)
        given = adapted(row_norms, Rows(layer), a, b, scale)
        np.testing.assert_allclose(given, expected, rtol=relative(96))


def test_rows_that_the_delta_cancels_are_computed_from_the_weights() -> None:
    random = np.random.default_rng(1)
    weight = random.normal(size=(6, 40)).astype(np.float32)
    layer = nn.Linear(40, 6, bias=False)
    layer.weight = mx.array(weight)
    a, b = weight[2:4], np.zeros((6, 2), np.float32)
    b[2, 0], b[3, 1], b[4, 0] = -0.5, -0.49999, 0.3
    expected = np.linalg.norm(weight.astype(np.float64) + 2.0 * (b.astype(float) @ a), axis=1)
    base, products, added = np.square(weight).sum(1), ((weight @ a.T) * b).sum(1), squared_delta_norms(a, b, 2.0)
    assert list(squared_row_norms(base, 2.0 * products, added)[1]) == [2, 3]
    np.testing.assert_allclose(adapted(RowNorms(), Rows(layer), a, b, 2.0), expected, rtol=relative(40), atol=1e-12)
    assert expected[2] == 0 < expected[3] < 1e-3


@pytest.mark.parametrize("rows", [3, 48, 67, 128, 130, 384])
@pytest.mark.parametrize("small", [dora_norms.SMALL, 96 * 3 * 16, 1])
def test_products_in_panels_are_those_of_the_definition(rows: int, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row counts that divide into panels and that do not, in blocks whose last one is short."""
    monkeypatch.setattr(dora_norms, "SMALL", small)
    monkeypatch.setattr(dora_norms, "BLOCK_VALUES", 96 * 150)
    random = np.random.default_rng(rows)
    layer = nn.Linear(96, rows, bias=False)
    a, b = random.normal(size=(3, 96)).astype(np.float32), random.normal(size=(rows, 3)).astype(np.float32)
    expected = np.linalg.norm(np.array(layer.weight).astype(np.float64) + 0.7 * (b.astype(float) @ a), axis=1)
    np.testing.assert_allclose(adapted(RowNorms(), Rows(layer), a, b, 0.7), expected, rtol=2e-6)


def test_layers_measured_together_are_what_each_is_alone() -> None:
    random, known = np.random.default_rng(3), RowNorms()
    pending, lengths, changes = [], [], []
    for number, (out, width, rank) in enumerate([(6, 40, 2), (64, 32, 3), (5, 16, 1)]):
        layer = nn.Linear(width, out, bias=False)
        weight = np.array(layer.weight).astype(np.float64)
        a, b = random.normal(size=(rank, width)).astype(np.float32), random.normal(size=(out, rank)).astype(np.float32)
        a[0], b[4] = weight[4], [-0.5, *[0] * (rank - 1)]  # One row of each is cancelled, all but a trifle.
        b[4, 0] += number * 1e-5
        moved = weight + 2.0 * (b.astype(float) @ a)
        lengths.append(np.linalg.norm(moved, axis=1))
        changes.append(np.linalg.norm(1.5 * moved - weight))
        delta = HostDelta(a, b, 2.0, np.ones(out, np.float32), squared_delta_norms(a, b, 2.0))
        pending.append(known.begin(f"layer {number}", Rows(layer), delta))
        mx.eval(pending[-1].next_piece()[0])
    rows = AdaptedRows.of(pending)
    for given, expected in zip(rows.split(rows.lengths), lengths, strict=True):
        np.testing.assert_allclose(given, expected, rtol=relative(40), atol=1e-7)
    np.testing.assert_allclose(rows.changes(np.full(rows.base.size, 1.5)), changes, rtol=relative(64 * 32))


def test_gains_that_are_no_numbers_are_named_whatever_turn_they_come_in(load: Load, layers: Layers) -> None:
    model = load()
    wrong = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    model.model.layers[0].self_attn.q_proj.weight[2] = 0
    model.model.layers[1].mlp.down_proj.weight[2] = 0
    tensors, config = random_adapter(layers, 2, 1, dora=True)
    for path in wrong:
        tensors[f"base_model.model.{path}.lora_B.weight"][2] = 0
    slots = slots_for(model)
    staging = slots.begin(read_bundle(file_of(tensors), config, layers=layers))
    turns = 0
    with pytest.raises(AdapterDoesNotFit) as caught:
        while not slots.measure(staging):
            turns += 1
    assert turns > 1
    assert {fault.partition(".lora_magnitude_vector")[0] for fault in caught.value.faults} == set(wrong)


def test_a_gain_that_is_no_number_is_refused_and_nothing_is_written(model: nn.Module, layers: Layers) -> None:
    path = "model.layers.1.mlp.up_proj"
    model.model.layers[1].mlp.up_proj.weight[3] = 0
    tensors, config = random_adapter(layers, 2, 1, dora=True)
    tensors[f"base_model.model.{path}.lora_B.weight"][3] = 0
    slots = slots_for(model)
    with pytest.raises(AdapterDoesNotFit, match=rf"{path}\.lora_magnitude_vector.*output 3") as caught:
        slots.stage(read_bundle(file_of(tensors), config, layers=layers))
    assert len(caught.value.faults) == 1 and slots.slots_in_use == 0 and slots.nbytes == 0


# ---- the forward --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
def test_dora_equals_merged_weights(load: Load, layers: Layers, rows: int) -> None:
    model, bundle, text = load(), make(layers, dora=True), tokens(rows)
    slots = slots_for(model)
    slots.route([slots.stage(bundle)] * rows)
    adapted = logits(model, text)
    assert_near(adapted, logits(merge(load(), bundle), text))
    without = make(layers)
    assert np.abs(adapted - logits(merge(load(), without), text)).max() > 0.1, "the magnitudes do something"


@pytest.mark.parametrize("which", ["load", "biased"])
@pytest.mark.parametrize("quantisation", [None, 4, 8])
def test_it_is_what_mlx_lm_computes(
    which: str, quantisation: int | None, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    load: Load = request.getfixturevalue(which)
    fresh = load if quantisation is None else lambda: quantise(load(), "affine", quantisation)
    layers = adaptable_layers(fresh())
    tensors, config = random_adapter(layers, 4, 3, 1.5, "mlx", dora=True)
    theirs = load_adapters(fresh(), str(save_adapter(tmp_path, tensors, config)))
    theirs.eval()
    model = fresh()
    slots = slots_for(model)
    slot = slots.stage(read_bundle(file_of(tensors), config, layers=layers))
    text = tokens(3)
    expected = logits(theirs, text)
    slots.route([slot] * 3)
    assert_near(logits(model, text), expected)
    slots.route([slot, 0, slot])
    mixed = logits(model, text)
    assert_near(mixed[[0, 2]], expected[[0, 2]])
    assert_near(mixed[1], logits(fresh(), text)[1])


def test_lora_dora_and_base_rows_share_a_batch(biased: Load) -> None:
    layers = adaptable_layers(biased())
    bundles = [
        make(layers, 1, rank=4),
        make(layers, 2, rank=11, targets=["q_proj", "down_proj"], dora=True),
        make(layers, 3, rank=1, scale=0.5, dora=True),
        make(layers, 4, rank=9, targets=["q_proj", "v_proj"]),
    ]
    model, text = biased(), tokens(9)
    slots = slots_for(model)
    staged = [0, *(slots.stage(bundle) for bundle in bundles)]
    order = [1, 0, 3, 2, 1, 4, 2, 0, 3]
    slots.route([staged[i] for i in order])
    mixed = logits(model, text)
    models = [biased(), *(merge(biased(), bundle) for bundle in bundles)]
    for row, which in enumerate(order):
        alone = logits(models[which], text[row : row + 1])[0]
        assert_near(mixed[row], alone, says=f"row {row}, adapter {which}")


def test_rows_without_a_gain_do_not_notice_that_others_have_one(load: Load, layers: Layers) -> None:
    """Layers without a bias: bit for bit, since a gain of one is exact."""
    model, text = load(), tokens(4)
    slots = slots_for(model)
    lora = slots.stage(make(layers, 1))
    slots.route([0, lora, 0, lora])
    before = logits(model, text)
    dora = slots.stage(make(layers, 2, dora=True))
    slots.route([0, lora, 0, dora])
    assert np.array_equal(logits(model, text)[:3], before[:3])


def test_a_batch_without_gains_does_not_touch_them(load: Load, layers: Layers) -> None:
    """Gains made poisonous on purpose: a batch of LoRA and base rows never reads them."""
    model, text = load(), tokens(3)
    slots = slots_for(model)
    lora, dora = slots.stage(make(layers, 1)), slots.stage(make(layers, 2, dora=True))
    slots.route([lora, 0, lora])
    expected = logits(model, text)
    for stack in slots._stacks.values():
        assert stack.gain is not None
        stack.gain = stack.gain * mx.nan
    assert np.array_equal(logits(model, text), expected)
    for route in ([lora] * 3, [0] * 3):
        slots.route(route)
        assert np.isfinite(logits(model, text)).all()
    slots.route([lora, dora, 0])
    assert np.isnan(logits(model, text)).any()


def test_a_reused_slot_has_no_gain_left(load: Load, layers: Layers) -> None:
    model, text = load(), tokens(3)
    slots = slots_for(model)
    first = make(layers, 1, dora=True)
    other = slots.stage(make(layers, 5, dora=True, targets=["k_proj", "o_proj"]))
    slot = slots.stage(first)
    slots.release(first.digest)
    narrow = make(layers, 2, rank=3, targets=["k_proj", "down_proj"])
    assert slots.stage(narrow) == slot
    merged = logits(merge(load(), narrow), text)
    for route in ([slot] * 3, [slot, other, slot]):  # The second reads the gains of k_proj for every row.
        slots.route(route)
        assert_near(logits(model, text)[[0, 2]], merged[[0, 2]])


def test_growth_keeps_gains(load: Load, layers: Layers) -> None:
    model, text = load(), tokens(1)
    slots = slots_for(model)
    bundles = [make(layers, seed, rank=1 + seed % 3 * 9, targets=["v_proj"], dora=seed % 2 == 0) for seed in range(9)]
    staged = [slots.stage(bundle) for bundle in bundles]
    for slot, bundle in zip(staged, bundles, strict=True):
        slots.route([slot])
        assert_near(logits(model, text), logits(merge(load(), bundle), text))


@pytest.mark.parametrize(("mode", "bits"), QUANTISED)
@pytest.mark.parametrize("dora", [False, True])
def test_quantised_bases_stay_quantised(load: Load, layers: Layers, mode: str, bits: int, dora: bool) -> None:
    model, text = quantise(load(), mode, bits), tokens(3)
    assert adaptable_layers(model) == layers, "packed widths are unpacked"
    packed = {name: value for name, value in tree_flatten(model.parameters()) if value.dtype == mx.uint32}
    bundle = make(layers, 1, dora=dora)
    twins = [dequantised(quantise(load(), mode, bits)) for _ in range(2)]
    adapted, plain = logits(merge(twins[0], bundle), text), logits(twins[1], text)
    slots = slots_for(model)
    slot = slots.stage(bundle)
    slots.route([slot, 0, slot])
    mixed = logits(model, text)
    assert_near(mixed[[0, 2]], adapted[[0, 2]])
    assert_near(mixed[1], plain[1])
    slots.route([slot] * 3)
    assert_near(logits(model, text), adapted)
    after = {name.replace(".base.", "."): value for name, value in tree_flatten(model.parameters())}
    assert all(after[name] is value for name, value in packed.items())


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("quantised", [False, True])
def test_nothing_is_promoted(biased: Load, dtype: mx.Dtype, quantised: bool) -> None:
    model = biased()
    model.set_dtype(dtype)
    if quantised:
        nn.quantize(model, group_size=32, bits=4)
    slots = slots_for(model, dtype)
    dora = slots.stage(make(adaptable_layers(model), dora=True))
    lora = slots.stage(make(adaptable_layers(model), 2))
    for route in ([dora] * 2, [dora, 0], [dora, lora]):
        slots.route(route)
        assert model(mx.array(tokens(2))).dtype == dtype


def test_staging_again_reads_the_weights_once_more_but_not_the_norms(
    model: nn.Module, layers: Layers, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = slots_for(model)
    first = make(layers, 1, dora=True)
    slots.stage(first)
    asked: list[object] = []
    squares = dora_norms.Rows.squares
    monkeypatch.setattr(dora_norms.Rows, "squares", lambda rows, block: asked.append(rows) or squares(rows, block))
    slots.stage(make(layers, 2, dora=True))
    assert not asked


# ---- the files ----------------------------------------------------------------------------------------------------


def test_both_formats_have_one_digest_and_give_the_same_bits(load: Load, layers: Layers) -> None:
    text, answers, digests = tokens(2), [], set()
    for kind in ("peft", "mlx"):
        model, bundle = load(), make(layers, kind=kind, dora=True)  # type: ignore[arg-type]
        slots = slots_for(model)
        slots.route([slots.stage(bundle)] * 2)
        answers.append(logits(model, text))
        digests.add(bundle.digest)
    assert np.array_equal(*answers)
    assert len(digests) == 1 and digests.isdisjoint({make(layers).digest})


def test_what_is_written_reads_back(load: Load, layers: Layers, tmp_path: Path) -> None:
    bundle = make(layers, 4, scale=1.1, dora=True)
    assert bundle.spec.kind == "dora"
    weights, config = peft.write(bundle)
    assert config["use_dora"] is True
    assert read_bundle(weights, json.loads(json.dumps(config)), layers=layers).digest == bundle.digest
    weights, config = mlx_lm.write(bundle)
    assert read_bundle(weights, None, layers=layers).digest == bundle.digest
    (tmp_path / "adapters.safetensors").write_bytes(weights)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    theirs = load_adapters(load(), str(tmp_path))
    theirs.eval()
    model = load()
    slots = slots_for(model)
    slots.route([slots.stage(bundle)])
    assert_near(logits(model, tokens(2)), logits(theirs, tokens(2)))


@pytest.mark.parametrize("suffix", ["", ".weight", ".default", ".default.weight"])
def test_every_spelling_of_the_magnitudes(layers: Layers, suffix: str) -> None:
    tensors, config = random_adapter(layers, 4, 1, dora=True)
    named = {name + suffix if name.endswith("vector") else name: value for name, value in tensors.items()}
    assert read_bundle(file_of(named), config, layers=layers).digest == make(layers, dora=True).digest


def test_faults_of_magnitudes_are_listed(layers: Layers) -> None:
    tensors, config = random_adapter(layers, 2, 1, targets=["up_proj"], dora=True)
    paths = [path for path in layers if path.endswith("up_proj")]
    names = [f"base_model.model.{path}.lora_magnitude_vector" for path in paths]
    tensors[names[0]] = tensors[names[0]][None]
    del tensors[names[1]]
    with pytest.raises(AdapterDoesNotFit) as caught:
        read_bundle(file_of(tensors), config, layers=layers)
    assert list(caught.value.faults) == [
        f"{paths[1]}.lora_magnitude_vector is missing: the file has only {paths[1]}.lora_A.weight and "
        f"{paths[1]}.lora_B.weight.",
        f"{names[0]} has shape [1, 96] but must be [96]: one number for each output.",
    ]
    tensors, config = random_adapter(layers, 2, 1, targets=["up_proj"], dora=True)
    tensors[names[0]][7] = np.nan
    with pytest.raises(AdapterDoesNotFit, match="not finite"):
        read_bundle(file_of(tensors), config, layers=layers)
    with pytest.raises(AdapterDoesNotFit, match="does not say that this is DoRA"):
        read_bundle(file_of(tensors), config | {"use_dora": False}, layers=layers)
