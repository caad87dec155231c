from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save

from adapters.bundle import AdapterBundle
from adapters.formats.read import read_bundle
from adapters.numerics import squared_delta_norms, thinned
from adapters.report import LARGEST, report
from adapters.spec import HALVES, ExpertsShape
from tests.support.adapter_files import make

LAYERS = {f"model.layers.{i}.{name}": shape for i in range(4) for name, shape in (("q", (6, 4)), ("down", (4, 10)))}


def bundle_of(factors: dict[str, tuple[np.ndarray, np.ndarray]], alpha: float = 4.0) -> AdapterBundle:
    """A and B of each module, all of one rank."""
    rank = next(iter(factors.values()))[0].shape[0]
    tensors = {}
    for path, (a, b) in factors.items():
        tensors[f"{path}.lora_A.weight"] = np.ascontiguousarray(a, np.float32)
        tensors[f"{path}.lora_B.weight"] = np.ascontiguousarray(b, np.float32)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": list(factors)}
    return read_bundle(save(tensors), config, layers=LAYERS)


def by_hand(a: np.ndarray, b: np.ndarray) -> float:
    """The definition, from the whole ΔW."""
    singular = np.linalg.svd(b.astype(np.float64) @ a.astype(np.float64), compute_uv=False)
    share = singular[singular > 1e-9 * singular[0]]
    share = share / share.sum()
    return float(np.exp(-np.sum(share * np.log(share))))


@pytest.mark.parametrize("size", [1.0, 1e-20, 1e15])
def test_effective_rank_is_that_of_the_whole_product(size: float) -> None:
    generator = np.random.default_rng(0)
    factors = {
        path: (generator.normal(size=(3, width)) * [[1.0], [0.1], [0.01]], size * generator.normal(size=(out, 3)))
        for path, (out, width) in LAYERS.items()
    }
    found = report(bundle_of(factors))
    expected = {path: by_hand(a.astype(np.float32), b.astype(np.float32)) for path, (a, b) in factors.items()}
    assert found.effective_rank == pytest.approx(np.mean(list(expected.values())), rel=1e-6)
    assert 1 < found.effective_rank < 3
    for module in found.largest_modules:
        assert module.effective_rank == pytest.approx(expected[module.module], rel=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_equal_directions_count_in_full(rank: int) -> None:
    a, b = np.eye(3, 4), np.eye(6, 3)
    b[:, rank:] = 0
    found = report(bundle_of({"model.layers.0.q": (a, b)}))
    assert found.effective_rank == pytest.approx(rank, rel=1e-6)


def test_the_largest_come_first_and_zero_ones_never() -> None:
    generator = np.random.default_rng(1)
    factors = {
        path: (generator.normal(size=(2, width)), generator.normal(size=(out, 2)) * at)
        for at, (path, (out, width)) in enumerate(LAYERS.items())
    }
    bundle = bundle_of(factors)
    found = report(bundle)
    zero = next(iter(LAYERS))
    assert found.zero_modules == (zero,)
    norms = {path: 2.0 * np.linalg.norm(b @ a) for path, (a, b) in factors.items()}
    expected = sorted(norms, key=lambda path: -norms[path])[:LARGEST]
    assert [module.module for module in found.largest_modules] == expected
    for module in found.largest_modules:
        assert module.delta_norm == pytest.approx(norms[module.module], rel=1e-5)
    assert found.delta_norm == pytest.approx(np.sqrt(sum(n**2 for n in norms.values())), rel=1e-5)
    assert (found.modules, found.nbytes) == (len(LAYERS), bundle.nbytes)


def test_an_adapter_before_its_first_step_has_nothing_to_rank() -> None:
    factors = {path: (np.ones((2, width)), np.zeros((out, 2))) for path, (out, width) in LAYERS.items()}
    found = report(bundle_of(factors))
    assert (found.effective_rank, found.largest_modules, found.delta_norm) == (None, (), 0.0)
    assert len(found.zero_modules) == len(LAYERS)


def test_a_product_that_cancels_is_not_a_number_and_so_not_reported() -> None:
    a, b = np.array([[1.0, 1, 1, 1], [1, 1, 1, 1]]), np.array([[1.0, -1]] * 6)
    found = report(bundle_of({"model.layers.0.q": (a, b), "model.layers.1.q": (np.eye(2, 4), np.eye(6, 2))}))
    assert found.effective_rank is not None and np.isfinite(found.effective_rank)


@pytest.mark.parametrize("off", [0.0, 1e-9, 1e-7, 1e-3])
def test_rows_that_depend_on_each_other_are_no_rank_beside_layers_whose_rows_do_not(off: float) -> None:
    """Exactly, or as nearly as float32 can say it."""
    generator = np.random.default_rng(3)
    factors = {path: (generator.normal(size=(3, w)), generator.normal(size=(o, 3))) for path, (o, w) in LAYERS.items()}
    a, _ = factors["model.layers.1.down"]
    a[2] = a[0] - 2 * a[1] + off * generator.normal(size=a.shape[1])
    found = report(bundle_of(factors)).ranks
    for path, both in factors.items():
        expected = by_hand(*(factor.astype(np.float32) for factor in both))
        # Squares of singular values have half the digits: below 1e-13 of the largest they are dropped, and by_hand
        # keeps what is above 1e-9 of it, so that one value of at most √1e-13 may be in one and not in the other.
        assert found[path] == pytest.approx(expected, rel=2e-5)


def test_modules_of_several_ranks() -> None:
    found = report(make(LAYERS, rank=3))
    assert found.effective_rank is not None and 1 <= found.effective_rank <= 3


def test_a_rank_above_the_width_of_a_layer_costs_no_more_than_its_file() -> None:
    """What would be rank × rank is made no larger than the layer."""
    generator = np.random.default_rng(2)
    for path, (out, width) in list(LAYERS.items())[:2]:
        a, b = generator.normal(size=(3000, width)), generator.normal(size=(out, 3000))
        thin = thinned(a, b)
        assert [factor.shape for factor in thin] == [(min(out, width), width), (out, min(out, width))]
        np.testing.assert_allclose(thin[1] @ thin[0], b @ a, atol=1e-9)
        found = report(bundle_of({path: (a, b)}))
        assert found.effective_rank == pytest.approx(by_hand(a, b), rel=1e-4)
        assert found.delta_norm == pytest.approx(4.0 / 3000 * np.linalg.norm(b @ a), rel=1e-4)
        norms = squared_delta_norms(a, b, 2.0)
        np.testing.assert_allclose(norms, 4.0 * np.square(b @ a).sum(axis=1))


def test_a_stack_of_experts_has_the_mean_of_its_experts() -> None:
    layers = {"model.layers.0.mlp.switch_mlp.up_proj": ExpertsShape(6, 5, 3)}
    bundle = make(layers, rank=4, kind="mlx", targets=["up_proj"])
    (path,) = layers
    a, b = (bundle.tensors[f"{path}.{half}"].array for half in HALVES)
    assert report(bundle).effective_rank == pytest.approx(np.mean([by_hand(a[i], b[i]) for i in range(3)]), rel=1e-5)


def test_a_stack_of_experts_has_the_mean_of_the_experts_that_do_something() -> None:
    generator = np.random.default_rng(2)
    a, b = generator.normal(size=(3, 2, 4)).astype(np.float32), generator.normal(size=(3, 6, 2)).astype(np.float32)
    b[1] = 0
    config = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": {"rank": 2, "scale": 2.0}}
    layers = {"model.layers.0.experts.up_proj": ExpertsShape(6, 4, 3)}
    path = next(iter(layers))
    found = report(read_bundle(save({f"{path}.lora_a": a, f"{path}.lora_b": b}), config, layers=layers))
    assert found.effective_rank == pytest.approx((by_hand(a[0], b[0]) + by_hand(a[2], b[2])) / 2, rel=1e-6)
    assert found.delta_norm == pytest.approx(2.0 * np.linalg.norm(b @ a), rel=1e-6)
