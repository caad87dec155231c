"""What `mlx_lm.load(adapter_path=…)` computes, and what our engine computes with the same directory pushed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.tuner.utils import load_adapters
from safetensors import safe_open
from safetensors.numpy import save

from adapters.bundle import AdapterBundle
from adapters.errors import AdapterUnsupported
from adapters.formats import mlx_lm as mlx_format
from adapters.formats import peft as peft_format
from adapters.formats import whole_tensors
from adapters.formats.read import read_bundle
from adapters.spec import place_of
from rollout_server.engine.model.load import read_model
from tests.laws.grids import corners, some_long
from tests.support import tiny_models
from tests.support.engine.driver import Driver, prompts_of
from tests.support.numbers.bounds import TINY
from tests.support.tiny_models import VOCAB_SIZE, random_adapter, save_adapter

PROMPTS = prompts_of([24, 9, 3], VOCAB_SIZE, seed=4)


def theirs(model: Path, adapter: Path | None) -> list[np.ndarray]:
    """Log-probabilities of the prompts' tokens after the first, on the base that config.json means: mlx-lm's own loader
    passes over YaRN's `truncate`, for one."""
    module = read_model(model).module
    if adapter is not None:
        module = load_adapters(module, str(adapter))
        module.eval()
    found = []
    for ids in PROMPTS:
        logits = module(mx.array([ids]))[0, :-1].astype(mx.float32)
        every = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        found.append(np.array(every)[np.arange(len(ids) - 1), ids[1:]])
    return found


def ours(driver: Driver, policy: str) -> list[np.ndarray]:
    return [np.array(sequence.logprobs[1:], np.float64) for sequence in driver.score(PROMPTS, policy=policy)]


def beyond(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    """The largest difference, in units of what rounding may do: mlx-lm's DoRA, for one, multiplies by the unpacked
    weight, we by the packed one."""
    return furthest(a, b) / TINY.of_logprobs(np.concatenate(b), max(map(len, PROMPTS)))


def furthest(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    return max(float(np.abs(one - other).max()) for one, other in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int | None], Path]:
    def path(family: str, bits: int | None) -> Path:
        place = tmp_path_factory.mktemp("parity")
        plain = tiny_models.build(family, place / family, num_hidden_layers=2)
        if bits is None:
            return plain
        target = place / f"{family}-{bits}"
        mlx_lm.convert(str(plain), str(target), quantize=True, q_bits=bits, q_group_size=32, dtype="float32")
        return target

    return path


def mlx_adapter(driver: Driver, directory: Path, *, dora: bool, rank: int = 5) -> AdapterBundle:
    layers = {path: shape for path, shape in driver.model.info.layers.items() if place_of(shape) == "linear"}
    tensors, config = random_adapter(layers, rank, 7, 1.5, "mlx", dora=dora, strength=0.25)
    save_adapter(directory, tensors, config)
    return read_bundle(save(tensors), config, layers=driver.model.info.layers)


@pytest.mark.parametrize(("family", "bits"), corners(["llama", "qwen3"], [None, 4, 8]))
def test_lora_and_dora_are_those_of_mlx_lm(
    family: str,
    bits: int | None,
    base_of: Callable[[str, int | None], Path],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    model = base_of(family, bits)
    driver = Driver.start(model)
    plain = theirs(model, None)
    assert beyond(ours(driver, "base"), plain) <= 1
    for kind in ("lora", "dora"):
        driver.push(kind, mlx_adapter(driver, tmp_path / kind, dora=kind == "dora"))
        expected = theirs(model, tmp_path / kind)
        assert furthest(expected, plain) > 0.1
        found = ours(driver, kind)
        difference = f"{family} {bits or 32} {kind} {furthest(found, expected):.1e}"
        record_property("max_abs_logprob_difference", difference)
        assert beyond(found, expected) <= 1, kind


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_of_peft_comes_out_for_mlx_lm(
    kind: str, base_of: Callable[[str, int | None], Path], tmp_path: Path
) -> None:
    """PEFT's file in, mlx-lm's file out, loaded by mlx-lm; and PEFT's file again from what came out."""
    model = base_of("llama", None)
    driver = Driver.start(model)
    bundle = driver.bundle(3, kind="peft", dora=kind == "dora")
    driver.push(kind, bundle)
    content, config = mlx_format.write(bundle)
    adapter = save_adapter(tmp_path / "exported", {}, config)
    (adapter / "adapters.safetensors").write_bytes(content)
    assert beyond(ours(driver, kind), theirs(model, adapter)) <= 1
    back = read_bundle(content, config, layers=driver.model.info.layers)
    again, settings = peft_format.write(back)
    assert read_bundle(again, settings, layers=driver.model.info.layers).digest == bundle.digest


@pytest.mark.parametrize("family", some_long(["llama", "qwen3", "qwen3_moe"], "qwen3_moe"))
def test_whole_tensors_are_exported_for_mlx_lm(family: str, base_of: Callable[..., Path], tmp_path: Path) -> None:
    """`fine_tune_type: full`: what mlx-lm loads is what we serve, and it reads back to the same digest."""
    model = base_of(family, None)
    driver = Driver.start(model)
    info, random = driver.model.info, np.random.default_rng(1)
    weights = mx.load(str(model / "model.safetensors"))
    tensors = {name: np.array(weights[name]) for name in weights if ".layers.1." in name or name == "model.norm.weight"}
    tensors = {
        n: (a + 0.2 * np.std(a) * random.standard_normal(a.shape)).astype(np.float32) for n, a in tensors.items()
    }
    some = {name: tensor for name, tensor in tensors.items() if "o_proj" in name or "norm" in name}
    for policy, each in (("all", tensors), ("some", some)):
        bundle = read_bundle(save(each), {"kind": "full"}, layers=info.layers, parameters=info.weights)
        driver.push(policy, bundle)
        body = whole_tensors.write_mlx(bundle, info.weights, info.layers)
        assert read_bundle(body, None, layers=info.layers, parameters=info.weights).digest == bundle.digest
        found = theirs(model, unpacked(body, tmp_path / policy))
        assert beyond(ours(driver, policy), found) <= 1
        assert furthest(found, theirs(model, None)) > 0.05


def test_whole_tensors_that_mlx_lm_has_no_place_for(base_of: Callable[..., Path]) -> None:
    info = Driver.start(base_of("qwen3", 4)).model.info
    for name, why in (
        ("model.layers.0.self_attn.o_proj.weight", "is quantised"),
        ("lm_head.weight", "shares the embedding's weight"),
    ):
        whole = {name: np.zeros(info.weights[name].shape, np.float32)}
        bundle = read_bundle(save(whole), {"kind": "full"}, layers=info.layers, parameters=info.weights)
        with pytest.raises(AdapterUnsupported, match=f"no plain parameter for {name}.* {why}"):
            whole_tensors.write_mlx(bundle, info.weights, info.layers)
    norm = {"model.norm.weight": np.zeros(info.weights["model.norm.weight"].shape, np.float32)}
    bundle = read_bundle(save(norm), {"kind": "delta"}, layers=info.layers, parameters=info.weights)
    with pytest.raises(AdapterUnsupported, match="mlx-lm has no tensors that are added"):
        whole_tensors.write_mlx(bundle, info.weights, info.layers)


def unpacked(body: bytes, adapter: Path) -> Path:
    """The directory that `weights export` makes of a file."""
    adapter.mkdir()
    (adapter / "adapters.safetensors").write_bytes(body)
    with safe_open(adapter / "adapters.safetensors", "numpy") as file:
        (adapter / "adapter_config.json").write_text(file.metadata()["adapter_config"])
    return adapter
