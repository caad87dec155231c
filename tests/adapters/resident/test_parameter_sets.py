"""Merged and dense versions: the weights they should have, and a base that is untouched afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import load_model
from safetensors.numpy import save

from adapters.bundle import AdapterBundle, Content
from adapters.errors import AdapterDoesNotFit, QuantisedBase, WeightsFull
from adapters.formats.read import read_bundle
from adapters.placement import Placement
from adapters.prepare import HostFactors, prepare
from adapters.report import completed, report
from adapters.resident.merge import merge as merge_weight
from adapters.resident.model_layers import adaptable_layers, replaceable_parameters
from adapters.resident.residency import ResidentVersions
from adapters.spec import Mode
from tests.support import tiny_models
from tests.support.adapter_files import logits, merge, tokens
from tests.support.numbers.bounds import assert_near

Load = Callable[[], nn.Module]
EMBED = "model.embed_tokens"


class Base:
    """A model with everything that stages on it."""

    def __init__(self, model: nn.Module, limit: int | None = None) -> None:
        self.model = model
        self.layers = adaptable_layers(model)
        self.parameters = replaceable_parameters(model, self.layers, "float32")
        self.resident = ResidentVersions(model, self.layers, self.parameters, mx.float32, limit)

    def bundle(self, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> AdapterBundle:
        return read_bundle(save(tensors), config, layers=self.layers, parameters=self.parameters)

    def low_rank(self, seed: int = 1, **options: Any) -> AdapterBundle:
        return self.bundle(*tiny_models.random_adapter(self.layers, 4, seed, **options))

    def stage(self, bundle: AdapterBundle, mode: Mode | None = None, *, dequantize: bool = False) -> Placement:
        prepared = prepare(bundle, "float32", mode=mode, parameters=self.parameters)
        self.resident.stage(prepared, dequantize=dequantize)
        return self.resident.placement(Content(bundle.digest, prepared.mode))

    def logits(self, placement: Placement = Placement()) -> np.ndarray:  # noqa: B008  frozen
        self.resident.route(placement.parameters, [placement.slot])
        return logits(self.model, tokens(2))

    def arrays(self) -> dict[str, int]:
        self.resident.route(0, [0])
        return {name: id(array) for name, array in tree_flatten(self.model.parameters())}


@pytest.fixture(scope="module")
def tied_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("qwen3", tmp_path_factory.mktemp("models") / "tied", num_hidden_layers=2)


@pytest.fixture
def tied(tied_path: Path) -> Load:
    return lambda: load_model(tied_path)[0]


def some(model: nn.Module, seed: int = 0, strength: float = 0.05) -> dict[str, np.ndarray]:
    """Noise for a few parameters of every kind."""
    random = np.random.default_rng(seed)
    weights = dict(tree_flatten(model.parameters()))
    names = [n for n in weights if any(part in n for part in ("down_proj", "norm.weight", "q_proj", "embed"))]
    return {n: (strength * random.standard_normal(weights[n].shape)).astype(np.float32) for n in names}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", [None, ["embed_tokens", "lm_head", "q_proj"]])
def test_merged_is_the_definition_and_the_adapter(tied: Load, dora: bool, targets: list[str] | None) -> None:
    base = Base(tied())
    bundle = base.low_rank(dora=dora, targets=targets)
    bare, before = base.logits(), base.arrays()
    merged, adapter = base.stage(bundle, "merged"), base.stage(bundle, "adapter")
    assert (merged.parameters, merged.slot, adapter.parameters, adapter.slot) == (1, 0, 0, 1)
    expected = logits(merge(tied(), bundle), tokens(2))
    assert_near(base.logits(merged), expected)
    assert_near(base.logits(adapter), expected)
    assert np.max(np.abs(bare - expected)) > 0.1
    assert np.array_equal(base.logits(), bare)
    assert {n: i for n, i in base.arrays().items() if ".base." not in n}.items() <= before.items()


def test_dense_versions_are_what_mlx_lm_would_load(load: Load) -> None:
    base, fresh = Base(load()), load()
    bare, ids = base.logits(), base.arrays()
    noise = some(fresh)
    weights = dict(tree_flatten(fresh.parameters()))
    full = {name: np.array(weights[name]) + value for name, value in noise.items()}
    fresh.load_weights([(name, mx.array(value)) for name, value in full.items()], strict=False)
    expected = logits(fresh, tokens(2))
    one = base.stage(base.bundle(full, {"kind": "full"}))
    two = base.stage(base.bundle(noise, {"kind": "delta"}))
    assert np.array_equal(base.logits(one), expected), "the same arithmetic"
    assert np.array_equal(base.logits(two), expected)
    assert base.resident.sets.size(one.parameters) == sum(value.nbytes for value in full.values())
    assert np.array_equal(base.logits(), bare) and base.arrays() == ids, "the very arrays are back"
    for _ in range(3):
        assert np.array_equal(base.logits(one), expected) and np.array_equal(base.logits(), bare)


def test_files_of_mlx_lm_full_fine_tuning(load: Load) -> None:
    base = Base(load())
    weights = {n: np.array(a) * np.float32(1.01) for n, a in tree_flatten(base.model.parameters())}
    last = {name: value for name, value in weights.items() if ".layers.1." in name}
    config = {"fine_tune_type": "full", "num_layers": 1, "lora_parameters": None, "iters": 10}
    bundle = base.bundle(last, config)
    assert bundle.spec.kind == "full" and bundle.digest == base.bundle(last, {"kind": "full"}).digest
    unused = {"lora_parameters": {"rank": 8, "dropout": 0.0, "scale": 20.0}}
    assert base.bundle(last, config | unused).digest == bundle.digest, "as earlier releases of mlx-lm wrote it"
    with pytest.raises(AdapterDoesNotFit, match="num_layers = 2 says that it was trained") as caught:
        base.bundle(last, config | {"num_layers": 2})
    assert len(caught.value.faults) == len(last)


def test_all_faults_of_dense_tensors_come_at_once(load: Load) -> None:
    base = Base(load())
    norm, proj = "model.norm.weight", "model.layers.0.mlp.down_proj.weight"
    bad = {
        norm: np.full(64, np.nan, np.float32),
        proj: np.zeros((96, 64), np.float32),
        "model.layers.0.mlp.up_proj.weight": np.zeros((96, 64), np.float64),
        "model.nothing.weight": np.zeros(3, np.float32),
    }
    with pytest.raises(AdapterDoesNotFit) as caught:
        base.bundle(bad, {"kind": "full"})
    assert caught.value.faults == (
        f"{proj} has shape [96, 64] but must be [64, 96]: it looks transposed.",
        "model.layers.0.mlp.up_proj.weight has dtype F64; F32, F16, BF16 are served.",
        "model.norm.weight holds values that are not finite (NaN or infinity).",
        "model.nothing.weight is unexpected: the base has no parameter model.nothing.weight.",
    )


def test_a_base_of_which_nothing_can_be_replaced_says_why_and_still_takes_adapters(load: Load) -> None:
    """One that several ranks serve: each has a part of it."""
    base = Base(load())
    with pytest.raises(AdapterDoesNotFit, match="whole tensors are not served by several ranks") as caught:
        read_bundle(save({"model.norm.weight": np.ones(64, np.float32)}), {"kind": "full"}, layers=base.layers)
    assert len(caught.value.faults) == 1
    tensors, config = tiny_models.random_adapter(base.layers, 4, 1)
    assert read_bundle(save(tensors), config, layers=base.layers).rank == 4


def test_whole_layers_beside_an_adapter_have_a_set_and_a_slot(load: Load, tied: Load) -> None:
    for model, head in ((load(), "lm_head.weight"), (tied(), f"{EMBED}.weight")):
        base = Base(model)
        tensors, config = tiny_models.random_adapter(base.layers, 4, 1, targets=["q_proj", "down_proj"])
        before = dict(tree_flatten(model.parameters()))
        own = np.array(before[head]) * np.float32(1.1)
        whole = {"base_model.model.lm_head.weight": own}
        bundle = base.bundle(tensors | whole, config | {"modules_to_save": ["lm_head"]})
        assert bundle.spec.dense == ("lm_head.weight",) and bundle.spec.kind == "lora"
        placement = base.stage(bundle)
        assert placement.parameters and placement.slot
        low = base.stage(base.bundle(tensors, config))
        assert_near(base.logits(placement), 1.1 * base.logits(low))
        assert_near(base.logits(base.stage(bundle, "merged")), base.logits(placement))
        with pytest.raises(AdapterDoesNotFit, match=r"lm_head\.weight is missing: modules_to_save names its module"):
            base.bundle(tensors, config | {"modules_to_save": ["lm_head"]})


def test_base_weights_that_a_file_carries_cost_no_set(tied: Load) -> None:
    base = Base(tied())
    tensors, config = tiny_models.random_adapter(base.layers, 4, 1, targets=["embed_tokens", "q_proj"], dora=True)
    table = np.array(dict(tree_flatten(base.model.parameters()))[f"{EMBED}.weight"])
    name = f"base_model.model.{EMBED}.base_layer.weight"
    same = base.stage(base.bundle(tensors | {name: table}, config))
    assert same == Placement(0, 1) and base.resident.sets.nbytes == 0
    other = base.stage(base.bundle(tensors | {name: table * np.float32(1.2)}, config))
    assert other.parameters == 1
    fresh = tied()
    fresh.update(tree_unflatten([(f"{EMBED}.weight", mx.array(table * np.float32(1.2)))]))
    expected = logits(merge(fresh, base.bundle(tensors, config)), tokens(2))
    assert_near(base.logits(other), expected)
    merged = base.stage(base.bundle(tensors | {name: table * np.float32(1.2)}, config), "merged")
    assert_near(base.logits(merged), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_is_unpacked_only_when_asked(tied: Load, bits: int) -> None:
    model = tied()
    nn.quantize(model, group_size=32, bits=bits)
    base = Base(model)
    bundle = base.low_rank(dora=True, targets=["embed_tokens", "q_proj", "down_proj"])
    adapter = base.stage(bundle)
    bare, ids, held = base.logits(), base.arrays(), base.resident.nbytes
    with pytest.raises(QuantisedBase) as caught:
        base.stage(bundle, "merged")
    assert "embed_tokens" in caught.value.message and "dequantize=true" in caught.value.message
    assert base.resident.nbytes == held and base.arrays() == ids
    merged = base.stage(bundle, "merged", dequantize=True)
    assert_near(base.logits(merged), base.logits(adapter))
    assert np.array_equal(base.logits(), bare) and base.arrays() == ids
    full = base.bundle({f"{EMBED}.weight": np.ones((320, 64), np.float32)}, {"kind": "full"})
    with pytest.raises(QuantisedBase):
        base.stage(full)
    base.stage(full, dequantize=True)


@pytest.mark.parametrize("bits", [0, 4])
def test_stacked_experts_are_merged(tmp_path: Path, bits: int) -> None:
    path = tiny_models.build("qwen3_moe", tmp_path / "moe", num_hidden_layers=2, moe_intermediate_size=64)
    model = load_model(path)[0]
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    base = Base(model)
    bundle = base.low_rank(kind="mlx", targets=["gate_proj", "down_proj", "up_proj"])
    bare = base.logits()
    adapter, merged = base.stage(bundle), base.stage(bundle, "merged", dequantize=bool(bits))
    assert_near(base.logits(merged), base.logits(adapter))
    assert np.array_equal(base.logits(), bare)


def test_merging_is_accurate_in_the_weights_own_dtype(load: Load) -> None:
    model = load()
    model.set_dtype(mx.bfloat16)
    layers = adaptable_layers(model)
    parameters = replaceable_parameters(model, layers, "bfloat16")
    resident = ResidentVersions(model, layers, parameters, mx.bfloat16)
    tensors, config = tiny_models.random_adapter(layers, 4, 1, targets=["down_proj"], dora=True)
    bundle = read_bundle(save(tensors), config, layers=layers, parameters=parameters)
    path = "model.layers.1.mlp.down_proj"
    a, b, m = (bundle.tensors[f"{path}.{part}"].float32().astype(np.float64) for part in bundle.spec.parts)
    weight = np.array(model.model.layers[1].mlp.down_proj.weight.astype(mx.float32)).astype(np.float64) + 2 * (b @ a)
    exact = weight * (m / np.linalg.norm(weight, axis=1))[:, None]
    resident.stage(prepare(bundle, "bfloat16", mode="merged", parameters=parameters), dequantize=False)
    resident.route(1, [0])
    own = model.model.layers[1].mlp.down_proj.weight
    rounded = np.array(mx.array(exact.astype(np.float32)).astype(mx.bfloat16).astype(mx.float32))
    assert own.dtype == mx.bfloat16
    different = np.array(own.astype(mx.float32)) != rounded
    assert different.mean() < 1e-3, "float32 and float64 may fall on two sides of a tie"


def test_what_does_not_fit_into_memory_changes_nothing(load: Load) -> None:
    probe = Base(load())
    bundle, other = probe.low_rank(1), probe.low_rank(2)
    probe.stage(bundle, "merged")
    one = probe.resident.nbytes
    probe.stage(bundle, "adapter")
    slots = probe.resident.slots.nbytes
    base = Base(load(), limit=one + slots)
    merged = base.stage(bundle, "merged")
    expected = base.logits(merged)
    adapter = base.stage(bundle, "adapter")
    assert base.resident.nbytes == one + slots
    with pytest.raises(WeightsFull):
        base.stage(other, "merged")
    for rank in (16, 200):
        tensors, config = tiny_models.random_adapter(base.layers, rank, 3)
        with pytest.raises(WeightsFull):
            base.stage(base.bundle(tensors, config))
    assert base.resident.nbytes == one + slots
    assert np.array_equal(base.logits(merged), expected)
    assert_near(base.logits(adapter), expected)
    for mode in ("merged", "adapter"):
        base.resident.release(Content(bundle.digest, mode))  # type: ignore[arg-type]
    assert base.resident.sets.nbytes == 0 and base.stage(other, "merged").parameters == 2


def test_bytes_of_stacks_are_told_before_they_are_made(load: Load) -> None:
    base = Base(load())
    slots = base.resident.slots
    for seed, (rank, dora) in enumerate([(4, False), (12, True), (30, False), (3, True), (40, False), (1, False)]):
        targets = [None, ["q_proj"], ["q_proj", "down_proj"]][seed % 3]
        tensors, config = tiny_models.random_adapter(base.layers, rank, seed, targets=targets, dora=dora)
        bundle = base.bundle(tensors, config)
        foretold = slots.nbytes_with(bundle)
        base.stage(bundle)
        assert slots.nbytes == foretold
        if seed == 4:
            base.resident.release(Content(bundle.digest, "adapter"))


def test_a_set_is_mounted_by_reference_whatever_is_wrapped_meanwhile(load: Load) -> None:
    base = Base(load())
    merged = base.stage(base.low_rank(1), "merged")
    expected = base.logits(merged)
    adapter = base.stage(base.low_rank(2))  # wraps every layer, while the set is mounted
    assert np.array_equal(base.logits(merged), expected)
    low = base.logits(adapter)
    assert np.array_equal(base.logits(merged), expected) and np.array_equal(base.logits(adapter), low)
    base.resident.release(Content(base.low_rank(1).digest, "merged"))
    assert np.array_equal(base.logits(adapter), low) and base.resident.sets.numbers == ()


def test_a_merged_weight_by_hand() -> None:
    weight, a, b = mx.ones((3, 2)), np.full((1, 2), 2, "f4"), np.array([[1, 2, 3]], "f4")
    merged = merge_weight(weight, HostFactors(a, b), mx.array([1.0, 2.0, 3.0]), "linear")
    rows = np.array([[3.0, 3.0], [5.0, 5.0], [7.0, 7.0]])
    exact = rows / np.linalg.norm(rows, axis=1)[:, None] * np.array([[1.0], [2.0], [3.0]])
    np.testing.assert_allclose(np.array(merged), exact, rtol=1e-6)


@pytest.mark.parametrize("mode", ["adapter", "merged"])
@pytest.mark.parametrize("case", ["random", "first step", "magnitudes alone"])
def test_what_dora_changes_is_told_with_its_magnitudes(tied: Load, mode: Mode, case: str) -> None:
    base = Base(tied())
    weights = {name: np.array(value, np.float64) for name, value in tree_flatten(base.model.parameters())}
    linear = {path: shape for path, shape in base.layers.items() if "proj" in path}
    tensors, config = tiny_models.random_adapter(linear, 4, 3, dora=True)
    expected = {}
    for path in linear:
        names = {
            part: next(n for n in tensors if f"{path}.lora_{part}" in n) for part in ("A", "B", "magnitude_vector")
        }
        weight = weights[f"{path}.weight"]
        if case != "random":
            tensors[names["B"]] = np.zeros_like(tensors[names["B"]])
            length = np.linalg.norm(weight, axis=1) * (1.5 if case == "magnitudes alone" else 1)
            tensors[names["magnitude_vector"]] = length.astype(np.float32)
        scale = base.bundle(tensors, config).spec.modules[path].scale
        a, b, m = (tensors[names[part]].astype(np.float64) for part in names)
        moved = weight + scale * b @ a
        gained = m[:, None] * moved / np.linalg.norm(moved, axis=1, keepdims=True)
        expected[path] = 0 if case == "first step" else np.linalg.norm(gained - weight)
    bundle = base.bundle(tensors, config)
    base.stage(bundle, mode)
    found = completed(report(bundle), bundle, base.resident.changes(Content(bundle.digest, mode)))
    assert set(found.zero_modules) == {path for path, norm in expected.items() if norm == 0}
    assert found.delta_norm == pytest.approx(np.sqrt(sum(norm**2 for norm in expected.values())), rel=1e-5)
    for module in found.largest_modules:
        assert module.delta_norm == pytest.approx(expected[module.module], rel=1e-5)


def test_slots_that_nobody_uses_are_no_reason_to_refuse(tied: Load) -> None:
    base = Base(tied())
    wide = base.bundle(*tiny_models.random_adapter(base.layers, 16, 1))
    base.stage(wide)
    held = base.resident.nbytes
    base.resident.release(Content(wide.digest, "adapter"))
    assert base.resident.nbytes == 0
    bare = base.logits()
    placed = base.stage(wide, "merged")
    assert base.resident.nbytes > 0
    base.resident.release(Content(wide.digest, "merged"))
    limited = Base(tied(), limit=held)
    for mode in ("adapter", "merged", "adapter"):
        limited.stage(limited.bundle(*tiny_models.random_adapter(base.layers, 16, 1)), mode)
        limited.resident.release(Content(wide.digest, mode))
    assert limited.resident.nbytes == 0 and placed.parameters
    np.testing.assert_array_equal(limited.logits(), bare)


def test_released_slots_shrink_to_those_that_are_left(tied: Load) -> None:
    base = Base(tied())
    wide, thin = base.bundle(*tiny_models.random_adapter(base.layers, 64, 1)), base.low_rank(2)
    base.stage(wide)
    placed = base.stage(thin)
    before, size = base.logits(placed), base.resident.nbytes
    base.resident.release(Content(wide.digest, "adapter"))
    assert base.resident.nbytes == size
    base.resident.trim()
    assert base.resident.nbytes < size / 4
    assert_near(base.logits(placed), before)
