"""Adapters on stacked experts: mlx-lm's own layers as oracle, and every row's version through the sort by expert."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchMLP
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

from adapters.bundle import AdapterBundle
from adapters.errors import AdapterDoesNotFit, AdapterUnsupported
from adapters.formats import mlx_lm, peft
from adapters.formats.read import read_bundle
from adapters.resident.layers import slot_stack
from adapters.resident.layers.experts import SORTED_FROM, AdaptedExperts
from adapters.resident.model_layers import adaptable_layers
from adapters.resident.slots import AdapterSlots
from adapters.spec import ExpertsShape
from tests.support import tiny_models
from tests.support.adapter_files import Layers, file_of, logits, make, merge, tokens
from tests.support.numbers.bounds import TINY, amplified, assert_near, relative
from tests.support.tiny_models import random_adapter, save_adapter
from trainer_client.adapter.digest import adapter_digest
from trainer_client.adapter.tensors import host_tensors

Load = Callable[[], nn.Module]
EXPERTS = ["gate_proj", "up_proj", "down_proj"]


def loader(family: str, directory: Path) -> Load:
    tiny_models.build(family, directory)
    return lambda: load_model(directory)[0]


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Load:
    return loader("qwen3_moe", tmp_path_factory.mktemp("models"))


def slots_for(model: nn.Module, dtype: mx.Dtype = mx.float32) -> AdapterSlots:
    return AdapterSlots(model, adaptable_layers(model), dtype)


def quantise(model: nn.Module, mode: str, bits: int) -> nn.Module:
    def on(path: str, module: nn.Module) -> bool:
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0 and "embed" not in path

    nn.quantize(model, group_size=32, bits=bits, mode=mode, class_predicate=on)
    return model


def of_experts(layers: Layers, seed: int = 1, rank: int = 3, targets: list[str] | None = None) -> AdapterBundle:
    return make(layers, seed, rank, kind="mlx", targets=targets or [*EXPERTS, "q_proj"])


def test_they_are_found(moe: Load) -> None:
    found = adaptable_layers(moe())["model.layers.0.mlp.switch_mlp.down_proj"]
    assert isinstance(found, ExpertsShape) and found == (64, 48) and found.experts == 4
    quantised = adaptable_layers(quantise(moe(), "affine", 4))["model.layers.0.mlp.switch_mlp.gate_proj"]
    assert isinstance(quantised, ExpertsShape) and quantised == (48, 64) and quantised.experts == 4


@pytest.mark.parametrize("length", [1, 5, 24])
@pytest.mark.parametrize("targets", [None, ["down_proj"]])
def test_rows_keep_their_version_whether_tokens_are_sorted_or_not(
    moe: Load, length: int, targets: list[str] | None
) -> None:
    model, text = moe(), tokens(5, length)
    assert (text.size * 2 >= SORTED_FROM) == (length == 24)
    layers = adaptable_layers(model)
    bundles = [of_experts(layers, 1, 3, targets), of_experts(layers, 2, 9, targets), make(layers, 3, dora=True)]
    slots = slots_for(model)
    staged = [0, *(slots.stage(bundle) for bundle in bundles)]
    models = [moe(), *(merge(moe(), bundle) for bundle in bundles)]
    alone = [logits(each, text) for each in models]
    order = [1, 0, 2, 3, 1]
    slots.route([staged[i] for i in order])
    mixed = logits(model, text)
    for row, which in enumerate(order):
        assert_near(mixed[row], alone[which][row], says=f"row {row}, adapter {which}")
    assert np.array_equal(mixed[1], alone[0][1]) or length == 24  # Sorted products may sum in another order.
    slots.route([staged[1]] * 5)
    assert_near(logits(model, text), alone[1])
    assert np.abs(alone[1] - alone[0]).max() > 0.1
    slots.route([0] * 5)
    assert np.array_equal(logits(model, text), alone[0])


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next", "gpt_oss"])
@pytest.mark.parametrize("quantisation", [None, ("affine", 4), ("affine", 8), ("mxfp4", 4)])
def test_it_is_what_mlx_lm_computes(family: str, quantisation: tuple[str, int] | None, tmp_path: Path) -> None:
    load = loader(family, tmp_path / "model")
    fresh = load if quantisation is None else lambda: quantise(load(), *quantisation)
    model, text = fresh(), tokens(3, 16)
    layers = adaptable_layers(model)
    tensors, config = random_adapter(layers, 4, 3, 1.5, "mlx", targets=[*EXPERTS, "q_proj"])
    theirs = load_adapters(fresh(), str(save_adapter(tmp_path / "adapter", tensors, config)))
    theirs.eval()
    expected, plain = logits(theirs, text), logits(fresh(), text)
    slots = slots_for(model)
    slot = slots.stage(read_bundle(file_of(tensors), config, layers=layers))
    slots.route([slot] * 3)
    within = amplified(family) * TINY.of_logits(expected, 16)
    assert_near(logits(model, text), expected, within)
    slots.route([slot, 0, slot])
    mixed = logits(model, text)
    assert_near(mixed[[0, 2]], expected[[0, 2]], within)
    assert_near(mixed[1], plain[1], within)
    assert np.abs(expected - plain).max() > 0.1


def test_a_block_that_gets_flat_tokens_and_the_other_kind_of_block() -> None:
    """Rows and tokens flattened into one, as some families do, through SwitchMLP."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = SwitchMLP(16, 24, 4, bias=True)

        def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
            flat = self.experts(x.flatten(0, 1), indices.flatten(0, 1))
            return mx.unflatten(flat, 0, x.shape[:2])

    mx.random.seed(0)
    model = Flat()
    layers = adaptable_layers(model)
    assert set(layers) == {"experts.fc1", "experts.fc2"}
    tensors, config = random_adapter(layers, 2, 1, kind="mlx", targets=["fc1", "fc2"])
    config |= {"num_layers": 0}
    bundle = read_bundle(file_of(tensors), config, layers=layers)
    slots = slots_for(model)
    slot = slots.stage(bundle)
    for length in (2, 24):
        x, indices = mx.random.normal((3, length, 16)), mx.random.randint(0, 4, (3, length, 2))
        answers = []
        for route in ([slot] * 3, [0] * 3, [0, slot, 0]):
            slots.route(route)
            answers.append(np.array(model(x, indices)))
        adapted, plain, mixed = answers
        assert_near(mixed[1], adapted[1])
        assert_near(mixed[[0, 2]], plain[[0, 2]])
        assert np.abs(adapted - plain).max() > 0.01
    slots.route([slot, 0])
    with pytest.raises(ValueError, match="2 rows"):
        model(mx.zeros((3, 1, 16)), mx.zeros((3, 1, 2), mx.uint32))


def test_many_choices_go_through_in_pieces(moe: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = moe(), tokens(3, 40)
    layers = adaptable_layers(model)
    slots = slots_for(model)
    slots.route([slots.stage(of_experts(layers, 1)), 0, slots.stage(of_experts(layers, 2, 9))])
    at_once = logits(model, text)
    for most in (64, 7):
        monkeypatch.setattr(slot_stack, "MOST_CHOICES", most)
        assert_near(logits(model, text), at_once, TINY.of_logits(at_once, 40))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_nothing_is_promoted(moe: Load, dtype: mx.Dtype) -> None:
    model = moe()
    model.set_dtype(dtype)
    slots = slots_for(model, dtype)
    slot = slots.stage(of_experts(adaptable_layers(model)))
    for route in ([slot] * 2, [slot, 0]):
        slots.route(route)
        assert model(mx.array(tokens(2))).dtype == dtype


def test_growth_reuse_and_unmounting(moe: Load) -> None:
    model, text = moe(), tokens(2)
    block, layers = model.model.layers[0].mlp.switch_mlp, adaptable_layers(model)
    names = {name for name, _ in tree_flatten(model.parameters())}
    slots = slots_for(model)
    bundles = [of_experts(layers, seed, 1 + seed % 3 * 9, ["up_proj"]) for seed in range(6)]
    staged = [slots.stage(bundle) for bundle in bundles]
    slots.release(bundles[2].digest)
    bundles[2] = of_experts(layers, 40, 2, ["down_proj"])
    assert slots.stage(bundles[2]) == staged[2]
    for slot, bundle in zip(staged, bundles, strict=True):
        slots.route([slot, 0])
        assert_near(logits(model, text)[0], logits(merge(moe(), bundle), text)[0])
    assert isinstance(model.model.layers[0].mlp.switch_mlp, AdaptedExperts)
    assert {name.replace(".base.", ".") for name, _ in tree_flatten(model.parameters())} == names
    slots.route([0])
    assert adaptable_layers(model) == layers
    slots.unmount()
    assert model.model.layers[0].mlp.switch_mlp is block


def test_the_file_the_digest_and_the_norm(moe: Load) -> None:
    layers = adaptable_layers(moe())
    tensors, config = random_adapter(layers, 4, 1, kind="mlx", targets=["down_proj"])
    bundle = read_bundle(file_of(tensors), config, layers=layers)
    assert adapter_digest(host_tensors(tensors), config) == bundle.digest
    weights, written = mlx_lm.write(bundle)
    assert read_bundle(weights, written, layers=layers).digest == bundle.digest
    with pytest.raises(AdapterUnsupported, match="stacked experts"):
        peft.write(bundle)
    a, b = (np.stack([t for n, t in tensors.items() if n.endswith(end)]) for end in ("lora_a", "lora_b"))
    assert bundle.delta_norm == pytest.approx(2.0 * np.linalg.norm((b @ a).ravel()), rel=relative(48))


def test_peft_targets_never_mean_them_and_their_dora_is_refused(moe: Load) -> None:
    layers = adaptable_layers(moe())
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]}
    assert all("q_proj" in path for path in peft.read({}, config, layers, {}).spec.modules)
    tensors, config = random_adapter(layers, 4, 1, kind="mlx", targets=["down_proj"])
    with pytest.raises(AdapterUnsupported, match="DoRA on stacked experts"):
        read_bundle(file_of(tensors), config | {"fine_tune_type": "dora"}, layers=layers)


def test_faults_are_listed(moe: Load) -> None:
    layers = adaptable_layers(moe())
    tensors, config = random_adapter(layers, 4, 1, kind="mlx", targets=["down_proj", "up_proj"])
    first, second = (f"model.layers.{i}.mlp.switch_mlp.down_proj" for i in range(2))
    third = "model.layers.1.mlp.switch_mlp.up_proj"
    tensors[f"{first}.lora_a"] = tensors[f"{first}.lora_a"][0]
    tensors[f"{second}.lora_b"] = tensors[f"{second}.lora_b"][:3]
    tensors[f"{third}.lora_a"][1, 2, 3] = np.nan
    with pytest.raises(AdapterDoesNotFit) as caught:
        read_bundle(file_of(tensors), config, layers=layers)
    assert list(caught.value.faults) == [
        f"{first}.lora_a has shape [4, 48] but must be [4, 4, 48]: one matrix for each expert.",
        f"{second}.lora_b has shape [3, 64, 4] but must be [4, 64, 4]: one matrix for each expert.",
        f"{third}.lora_a holds values that are not finite (NaN or infinity).",
    ]
