from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.utils import load_adapters

from adapters.bundle import AdapterBundle
from adapters.errors import AdapterDoesNotFit
from adapters.formats.read import read_bundle
from adapters.resident.layers.linear import AdaptedLinear
from adapters.resident.model_layers import adaptable_layers
from adapters.resident.slots import AdapterSlots
from rollout_server.engine.model.load import read_model
from tests.support import tiny_models
from tests.support.adapter_files import Layers, file_of, logits, make, merge, tokens
from tests.support.numbers.bounds import TINY, amplified, assert_near
from tests.support.tiny_models import random_adapter, save_adapter

Load = Callable[[], nn.Module]


def slots_for(model: nn.Module, dtype: mx.Dtype = mx.float32) -> AdapterSlots:
    return AdapterSlots(model, adaptable_layers(model), dtype)


@pytest.mark.parametrize("rows", [1, 3])
def test_one_adapter_equals_merged_weights(load: Load, layers: Layers, rows: int) -> None:
    model, bundle, text = load(), make(layers), tokens(rows)
    slots = slots_for(model)
    slots.route([slots.stage(bundle)] * rows)
    adapted = logits(model, text)
    assert_near(adapted, logits(merge(load(), bundle), text))
    assert np.abs(adapted - logits(load(), text)).max() > 0.1  # The adapter does something.


def test_decoding_with_a_cache_equals_merged_weights(load: Load, layers: Layers) -> None:
    model, bundle, text = load(), make(layers), tokens(2, 6)
    slots = slots_for(model)
    slots.route([slots.stage(bundle), 0])
    cache = make_prompt_cache(model)
    stepped = [np.array(model(mx.array(text[:, i : i + 1]), cache=cache)) for i in range(6)]
    wanted = [logits(merge(load(), bundle), text[:1]), logits(load(), text[1:])]
    assert_near(np.concatenate(stepped, axis=1), np.concatenate(wanted))


def test_the_mlx_lm_file_gives_what_mlx_lm_gives(load: Load, layers: Layers, tmp_path: Path) -> None:
    tensors, config = random_adapter(layers, 4, 3, 1.5, "mlx")
    theirs = load_adapters(load(), str(save_adapter(tmp_path, tensors, config)))
    theirs.eval()
    model = load()
    slots = slots_for(model)
    slots.route([slots.stage(read_bundle(file_of(tensors), config, layers=layers))])
    text = tokens(2)
    assert_near(logits(model, text), logits(theirs, text))


def test_both_formats_give_the_same_bits(load: Load, layers: Layers) -> None:
    text, answers = tokens(2), []
    for kind in ("peft", "mlx"):
        model = load()
        slots = slots_for(model)
        slots.route([slots.stage(make(layers, kind=kind))] * 2)
        answers.append(logits(model, text))
    assert np.array_equal(*answers)


def test_each_row_of_a_mixed_batch_is_as_alone(load: Load, layers: Layers) -> None:
    bundles = [
        make(layers, 1, rank=4),
        make(layers, 2, rank=11, targets=["q_proj", "down_proj"]),
        make(layers, 3, rank=1, scale=0.5),
    ]
    model, text = load(), tokens(7)
    slots = slots_for(model)
    staged = [0, *(slots.stage(bundle) for bundle in bundles)]
    order = [1, 0, 3, 2, 1, 2, 0]
    slots.route([staged[i] for i in order])
    mixed = logits(model, text)
    models = [load(), *(merge(load(), bundle) for bundle in bundles)]
    for row, which in enumerate(order):
        alone = logits(models[which], text[row : row + 1])[0]
        assert_near(mixed[row], alone, says=f"row {row}, adapter {which}")


def test_base_rows_of_a_mixed_batch_are_the_base_bit_for_bit(load: Load, layers: Layers) -> None:
    model, text = load(), tokens(4)
    plain = logits(model, text)
    slots = slots_for(model)
    slot = slots.stage(make(layers))
    slots.route([0, slot, 0, slot])
    mixed = logits(model, text)
    assert np.array_equal(mixed[[0, 2]], plain[[0, 2]])
    assert not np.allclose(mixed[[1, 3]], plain[[1, 3]], atol=0.1)
    slots.route([0] * 4)
    assert np.array_equal(logits(model, text), plain)


def test_gathered_and_uniform_paths_agree(load: Load, layers: Layers) -> None:
    model, text = load(), tokens(3)
    slots = slots_for(model)
    slot = slots.stage(make(layers, rank=5))
    slots.route([slot] * 3)
    uniform = logits(model, text)
    slots.route([slot, slot, 0])
    assert_near(logits(model, text)[:2], uniform[:2])


def test_swapping_back_restores_the_bits(load: Load, layers: Layers) -> None:
    model, text = load(), tokens(3)
    slots = slots_for(model)
    first = slots.stage(make(layers, 1, rank=4))
    slots.route([first] * 3)
    uniform = logits(model, text)
    second = slots.stage(make(layers, 2, rank=20))  # Grows the rank of every stack.
    assert np.array_equal(logits(model, text), uniform), "staging alone must change nothing"
    slots.route([second] * 3)
    assert np.abs(logits(model, text) - uniform).max() > 0.1
    slots.route([first] * 3)
    assert np.array_equal(logits(model, text), uniform)
    slots.route([first, second, 0])
    mixed = logits(model, text)
    slots.route([second, 0, first])
    logits(model, text)
    slots.route([first, second, 0])
    assert np.array_equal(logits(model, text), mixed)


def test_the_same_digest_shares_a_slot(model: nn.Module, layers: Layers) -> None:
    slots, bundle = slots_for(model), make(layers)
    slot = slots.stage(bundle)
    assert slots.stage(make(layers, kind="mlx")) == slot == slots.slot(bundle.digest)
    assert slots.slots_in_use == 1
    slots.route([slot])
    slots.release(bundle.digest)
    assert slots.slots_in_use == 0
    with pytest.raises(ValueError, match="hold no adapter"):
        slots.route([slot])
    with pytest.raises(KeyError):
        slots.release(bundle.digest)


def test_a_reused_slot_has_no_residue(load: Load, layers: Layers) -> None:
    model, text = load(), tokens(3)
    slots = slots_for(model)
    wide = make(layers, 1, rank=16)
    slot = slots.stage(wide)
    slots.release(wide.digest)
    narrow = make(layers, 2, rank=3, targets=["k_proj"])
    assert slots.stage(narrow) == slot
    merged = logits(merge(load(), narrow), text)
    slots.route([slot] * 3)
    assert_near(logits(model, text), merged)
    slots.route([slot, 0, slot])
    assert_near(logits(model, text)[[0, 2]], merged[[0, 2]])
    for path, stack in slots._stacks.items():
        assert float(mx.abs(stack.a[slot, 3:]).sum()) == 0 == float(mx.abs(stack.b[slot, 3:]).sum())
        assert path.endswith("k_proj") or float(mx.abs(stack.b[slot]).sum()) == 0


def test_growth_keeps_the_other_slots(load: Load, layers: Layers) -> None:
    model, text = load(), tokens(1)
    slots = slots_for(model)
    bundles = [make(layers, seed, rank=1 + seed % 3 * 9, targets=["v_proj", "up_proj"]) for seed in range(9)]
    staged = [slots.stage(bundle) for bundle in bundles]
    assert sorted(staged) == list(range(1, 10))
    for slot, bundle in zip(staged, bundles, strict=True):
        slots.route([slot])
        assert_near(logits(model, text), logits(merge(load(), bundle), text))
    before = slots.nbytes
    for bundle in bundles[:5]:
        slots.release(bundle.digest)
    for seed in range(20, 25):
        slots.stage(make(layers, seed, rank=4, targets=["v_proj"]))
    assert slots.nbytes == before, "free slots are used again"


def test_only_targeted_layers_are_wrapped(model: nn.Module, layers: Layers) -> None:
    slots_for(model).stage(make(layers, targets=["o_proj"]))
    wrapped = {path for path, module in model.named_modules() if isinstance(module, AdaptedLinear)}
    assert wrapped == {path for path in layers if path.endswith("o_proj")}


def test_wrapping_adds_no_parameters_and_unmounting_restores_the_objects(model: nn.Module, layers: Layers) -> None:
    names = {name for name, _ in tree_flatten(model.parameters())}
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    slots, text = slots_for(model), tokens(2)
    plain = logits(model, text)
    slots.route([slots.stage(make(layers))] * 2)
    logits(model, text)
    mounted = {name.replace(".base.", ".") for name, _ in tree_flatten(model.parameters())}
    assert mounted == names
    assert adaptable_layers(model) == layers
    slots.unmount()
    restored = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert restored.keys() == linears.keys()
    assert all(restored[path] is linears[path] for path in linears)
    assert np.array_equal(logits(model, text), plain)


def test_modes_and_freezing_reach_the_base(model: nn.Module, layers: Layers) -> None:
    slots_for(model).stage(make(layers))
    adapted = model.model.layers[0].self_attn.q_proj
    assert not adapted.training
    model.train()
    assert adapted.base.training
    model.freeze()
    assert not tree_flatten(model.trainable_parameters())


@pytest.mark.parametrize("family", sorted(set(tiny_models.FAMILIES) - {"qwen3"}))
def test_every_family_keeps_rows_apart(family: str, tmp_path: Path) -> None:
    """Every layer of every kind of model, routers, mixers, embeddings and tied heads among them, gets each row's own
    version."""
    directory = tiny_models.build(family, tmp_path)
    model, text = read_model(directory).module, tokens(3)
    layers = adaptable_layers(model)
    named = {path.rsplit(".", 1)[-1] for path in layers}
    assert any("embed" in name for name in named)
    bundle = make(layers, 1, rank=3, targets=sorted(named))
    plain, merged = (logits(each, text) for each in (model, merge(read_model(directory).module, bundle)))
    slots = slots_for(model)
    slot = slots.stage(bundle)
    slots.route([0, slot, 0])
    mixed = logits(model, text)
    within = amplified(family) * TINY.of_logits(merged, 7)
    assert_near(mixed[1], merged[1], within)
    assert_near(mixed[[0, 2]], plain[[0, 2]], within)
    assert np.abs(mixed[1] - plain[1]).max() > 0.01


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_stays_quantised(load: Load, layers: Layers, bits: int) -> None:
    model, text = load(), tokens(3)
    nn.quantize(model, group_size=32, bits=bits, class_predicate=lambda _, m: isinstance(m, nn.Linear))
    assert adaptable_layers(model) == layers, "packed widths are unpacked"
    bundle = make(layers, 1)
    expected = []
    for adapted in (True, False):
        twin = load()
        nn.quantize(twin, group_size=32, bits=bits, class_predicate=lambda _, m: isinstance(m, nn.Linear))
        dequantise(twin)
        expected.append(logits(merge(twin, bundle) if adapted else twin, text))
    slots = slots_for(model)
    slot = slots.stage(bundle)
    slots.route([slot, 0, slot])
    mixed = logits(model, text)
    assert_near(mixed[[0, 2]], expected[0][[0, 2]])
    assert_near(mixed[1], expected[1][1])
    slots.route([slot] * 3)
    assert_near(logits(model, text), expected[0])


def dequantise(model: nn.Module) -> None:
    """Replace every quantised layer by a plain one with the values that it stands for."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.QuantizedLinear):
            weight = mx.dequantize(layer.weight, layer.scales, layer.biases, layer.group_size, layer.bits)
            plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            plain.weight = weight
            model.update_modules(unflatten(path, plain))


def unflatten(path: str, module: nn.Module) -> dict[str, object]:
    from mlx.utils import tree_unflatten

    return tree_unflatten([(path, module)])


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("quantised", [False, True])
def test_nothing_is_promoted(load: Load, layers: Layers, dtype: mx.Dtype, quantised: bool) -> None:
    """A float32 adapter on a base of half precision: residuals, keys and values keep the base's dtype."""
    model = load()
    model.set_dtype(dtype)
    if quantised:
        nn.quantize(model, group_size=32, bits=4)
    slots = slots_for(model, dtype)
    slot = slots.stage(make(layers))
    for route in ([slot] * 2, [slot, 0]):
        slots.route(route)
        cache = make_prompt_cache(model)
        out = model(mx.array(tokens(2)), cache=cache)
        assert out.dtype == dtype
        assert {part.dtype for layer in cache for part in (layer.keys, layer.values)} == {dtype}


def test_bf16_files_keep_their_bits(load: Load, layers: Layers) -> None:
    tensors, config = random_adapter(layers, 4, 5)
    rounded = {
        name: np.array(mx.array(value).astype(mx.bfloat16).astype(mx.float32)) for name, value in tensors.items()
    }
    half = {name: mx.array(value).astype(mx.bfloat16) for name, value in rounded.items()}
    bundle = read_bundle(bf16_file(half), config, layers=layers)
    assert {tensor.dtype for tensor in bundle.tensors.values()} == {"BF16"}
    full = read_bundle(file_of(rounded), config, layers=layers)
    assert bundle.digest != full.digest and bundle.delta_norm == pytest.approx(full.delta_norm)
    text, answers = tokens(2), []
    for each in (bundle, full):
        model = load()
        slots = slots_for(model)
        slots.route([slots.stage(each)])
        answers.append(logits(model, text))
    assert np.array_equal(*answers)


def bf16_file(arrays: dict[str, mx.array]) -> bytes:
    import io

    buffer = io.BytesIO()
    buffer.name = "adapter.safetensors"
    mx.save_safetensors(buffer, arrays)
    return buffer.getvalue()


def test_values_beyond_the_models_dtype_are_refused_before_anything_is_written(load: Load, layers: Layers) -> None:
    tensors, config = random_adapter(layers, 4, 1)
    name = "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"
    tensors[name] = tensors[name] + np.float32(60000)
    bundle = read_bundle(file_of(tensors), config, layers=layers)
    model = load()
    model.set_dtype(mx.float16)
    slots = slots_for(model, mx.float16)
    with pytest.raises(AdapterDoesNotFit, match=r"layers\.1\.self_attn\.k_proj.*float16"):
        slots.stage(bundle)
    assert slots.slots_in_use == 0 and slots.nbytes == 0


def test_staging_writes_in_place(model: nn.Module, layers: Layers) -> None:
    """Neither the routed views nor anything else may keep a second reference to the stacks."""
    slots = slots_for(model)
    bundles = [make(layers, seed, rank=32) for seed in range(12)]
    for bundle in bundles[:11]:
        slots.stage(bundle)
    slots.release(bundles[0].digest)
    slots.route([2])
    logits(model, tokens(1))
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    slots.stage(bundles[11])
    assert mx.get_peak_memory() - before < slots.nbytes / 2, "the stacks were copied"


def test_a_batch_of_another_size_is_refused(model: nn.Module, layers: Layers) -> None:
    slots = slots_for(model)
    slots.route([slots.stage(make(layers)), 0])
    with pytest.raises(ValueError, match="2 rows"):
        logits(model, tokens(3))


def test_flat_inputs_count_as_one_token_a_row(layers: Layers) -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    shape = adaptable_layers(model)
    assert shape == {"layers.0": (5, 6)}
    bundle: AdapterBundle = make(shape, rank=2)
    slots = AdapterSlots(model, shape, mx.float32)
    slot = slots.stage(bundle)
    x = mx.random.normal((3, 6))
    slots.route([slot, 0, slot])
    flat = model(x)
    assert flat.shape == (3, 5)
    assert mx.allclose(flat, model(x[:, None])[:, 0]).item()
    slots.unmount()
    assert isinstance(model.layers[0], nn.Linear)
