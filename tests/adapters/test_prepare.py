"""Versions made ready off the engine's thread, and room that is given back when they are gone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from safetensors.numpy import save

from adapters.bundle import make_bundle
from adapters.errors import AdapterDoesNotFit
from adapters.formats.read import read_bundle
from adapters.numerics import PIECE
from adapters.prepare import LARGEST, cast, host_factors, prepare
from adapters.resident.model_layers import adaptable_layers
from adapters.resident.slots import AdapterSlots
from adapters.spec import AdapterSpec, ModuleSpec, Parameter
from adapters.tensors import AdapterTensor
from tests.support.adapter_files import Layers, logits, make, merge, tokens
from tests.support.numbers.bounds import assert_near

Load = Callable[[], nn.Module]


def slots_for(model: nn.Module, dtype: mx.Dtype = mx.float32) -> AdapterSlots:
    return AdapterSlots(model, adaptable_layers(model), dtype)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_what_is_made_ready_on_the_host_is_what_mlx_would_round_to(dtype: mx.Dtype) -> None:
    values = np.random.default_rng(0).normal(size=4096).astype(np.float32) * np.float32(1e3)
    values[:6] = [0.0, -0.0, 1.00390625, 1.01171875, 65504.0, 1e-40]  # Ties to even, the largest, a subnormal.
    name = str(dtype).removeprefix("mlx.core.")
    given = mx.array(cast(values, name))
    given = given.view(dtype) if dtype == mx.bfloat16 else given
    assert mx.array_equal(given, mx.array(values).astype(dtype)).item()


def test_bfloat16_is_rounded_as_the_formula_says_at_every_upper_half() -> None:
    """Around each of the 65,536 upper halves: itself, the ties, and what lies beside them."""
    upper = np.arange(1 << 16, dtype=np.uint32)[:, None] << 16
    bits = upper | np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    values = bits.view(np.float32)[np.isfinite(bits.view(np.float32)).all(axis=1)]
    whole = values.view(np.uint32).astype(np.uint64)
    below, rest = whole >> 16, whole & 0xFFFF
    expected = below + ((rest > 0x8000) | ((rest == 0x8000) & (below % 2 == 1)))
    assert np.array_equal(cast(values, "bfloat16"), expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("stored", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("experts", [(), (3,)])
def test_factors_are_the_scaled_turned_and_cast_ones(dtype: str, stored: str, experts: tuple[int, ...]) -> None:
    """Against one step after the other, in shapes of less than a piece and of several."""
    random, tensors, modules = np.random.default_rng(0), {}, {}
    for at, (rank, width, out) in enumerate(((2, 3, 5), (4, PIECE, 9), (16, 8, 3 * PIECE // 16 + 1))):
        modules[f"layers.{at}"] = ModuleSpec(rank, 0.37 * (at + 1), "experts" if experts else "linear")
        for half, shape in (("lora_A", (*experts, rank, width)), ("lora_B", (*experts, out, rank))):
            values = random.normal(size=shape).astype(np.float32)
            array = {"F32": values, "F16": values.astype(np.float16), "BF16": cast(values, "bfloat16")}[stored]
            tensors[f"layers.{at}.{half}"] = AdapterTensor(stored, array)
    prepared = prepare(make_bundle(AdapterSpec("lora", modules), tensors), dtype)
    for path, module in modules.items():
        a, b = (tensors[f"{path}.{half}"].float32() for half in ("lora_A", "lora_B"))
        factors = prepared.factors[path]
        assert np.array_equal(factors.a, cast(a, dtype))
        assert np.array_equal(
            factors.b, cast(np.ascontiguousarray(b.swapaxes(-1, -2)) * np.float32(module.scale), dtype)
        )
        assert factors.a.dtype == factors.b.dtype == cast(a, dtype).dtype


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [3e38, 65520.0])
def test_a_value_out_of_range_is_refused_whether_or_not_the_factors_are_made_already(dtype: str, value: float) -> None:
    spec = AdapterSpec("lora", {"layer": ModuleSpec(1, 2.0)})
    tensors = {"layer.lora_A": np.full((1, 3), value, np.float32), "layer.lora_B": np.ones((2, 1), np.float32)}
    bundle = make_bundle(spec, {name: AdapterTensor("F32", array) for name, array in tensors.items()})
    factors = host_factors(bundle.spec, bundle.tensors, dtype, "adapter")
    for given in (None, factors):
        if dtype == "float16" or (dtype == "bfloat16" and value > LARGEST["bfloat16"]):
            with pytest.raises(AdapterDoesNotFit, match=f"outside the range of {dtype}"):
                prepare(bundle, dtype, factors=given)
        else:
            kept = prepare(bundle, dtype, factors=given).factors["layer"]
            assert np.array_equal(kept.a, factors["layer"].a) and np.array_equal(kept.b, factors["layer"].b)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dora", [False, True])
def test_a_prepared_version_is_the_same_version(load: Load, layers: Layers, dtype: str, dora: bool) -> None:
    bundle, text, answers = make(layers, dora=dora), tokens(2), []
    assert prepare(bundle, dtype).dtype == dtype
    for version in (bundle, prepare(bundle, dtype), prepare(bundle, "float16")):  # The last is made ready once more.
        model = load()
        model.set_dtype(getattr(mx, dtype))
        slots = slots_for(model, getattr(mx, dtype))
        slots.route([slots.stage(version)] * 2)  # A CPU gathers in float32 only.
        answers.append(logits(model, text))
    assert np.array_equal(answers[0], answers[1]) and np.array_equal(answers[0], answers[2])


def test_ranks_that_add_nothing_cost_a_dora_version_no_product(load: Load, layers: Layers) -> None:
    text, narrow = tokens(2), make(layers, rank=4, dora=True)
    tensors = {}
    for name, tensor in narrow.tensors.items():
        wider = {"lora_A": ((0, 12), (0, 0)), "lora_B": ((0, 0), (0, 12))}.get(name.rpartition(".")[2])
        tensors[name] = tensor if wider is None else AdapterTensor(tensor.dtype, np.pad(tensor.array, wider))
    modules = {path: replace(module, rank=16) for path, module in narrow.spec.modules.items()}
    padded = make_bundle(AdapterSpec("dora", modules), tensors)
    zero = {n: AdapterTensor(t.dtype, t.array * np.float32("lora_B" not in n)) for n, t in narrow.tensors.items()}
    assert {delta.a.shape[0] for delta in prepare(padded, "float32").deltas.values()} == {4}
    at_first = make_bundle(narrow.spec, zero)
    assert {delta.b.shape[1] for delta in prepare(at_first, "float32").deltas.values()} == {1}
    for bundle in (padded, at_first):
        model = load()
        slots = slots_for(model)
        slots.route([slots.stage(bundle)] * 2)
        assert_near(logits(model, text), logits(merge(load(), bundle), text))


def test_memory_of_versions_that_are_gone_is_given_back(load: Load, layers: Layers) -> None:
    model, text = load(), tokens(2)
    slots = slots_for(model)
    kept = make(layers, 1, rank=4)
    slots.stage(kept)
    slots.route([slots.slot(kept.digest), 0])
    before, small = logits(model, text), slots.nbytes
    many = [make(layers, seed, rank=40, dora=seed % 2 == 0, targets=["v_proj", "o_proj"]) for seed in range(2, 22)]
    for bundle in many:
        slots.stage(bundle)
    assert slots.nbytes > 2 * small
    for bundle in many:
        slots.release(bundle.digest)
    last = make(layers, 50, rank=3, targets=["v_proj"])
    slot = slots.stage(last)
    assert slots.slots_in_use == 2 and slots.nbytes <= small
    slots.route([slots.slot(kept.digest), 0])
    assert np.array_equal(logits(model, text), before)
    slots.route([slot, 0])
    assert_near(logits(model, text)[0], logits(merge(load(), last), text)[0])


def test_a_whole_tensor_of_a_parameter_that_is_not_there_is_refused_by_name() -> None:
    parameters = {"norm.weight": Parameter((4,), "float32")}
    bundle = read_bundle(
        save({"norm.weight": np.ones(4, np.float32)}), {"kind": "full"}, layers={}, parameters=parameters
    )
    assert "norm.weight" in prepare(bundle, "float32", parameters=parameters).dense
    with pytest.raises(AdapterDoesNotFit, match=r"norm\.weight is no parameter that a version can replace here"):
        prepare(bundle, "float32")
