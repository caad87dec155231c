"""The test models are what the other tests take them for."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache, make_prompt_cache
from mlx_lm.tuner.utils import load_adapters
from transformers import AutoTokenizer

from rollout_server.engine.model.load import read_model
from tests.support.numbers.bounds import assert_near
from tests.support.tiny_models import FAMILIES, SPECIAL_TOKENS, build, linear_layers, random_adapter, save_adapter

CACHES = {
    "llama": {KVCache},
    "qwen3": {KVCache},
    "gemma3_text": {KVCache, RotatingKVCache},
    "llama_sliding": {KVCache, RotatingKVCache},
    "gpt_oss": {KVCache, RotatingKVCache},
    "mamba2": {ArraysCache},
    "granitemoehybrid": {KVCache, ArraysCache},
    "qwen3_next": {KVCache, ArraysCache},
    "falcon_h1": {CacheList},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_loads_and_predicts_something_that_depends_on_the_whole_prompt(family: str, tmp_path: Path) -> None:
    model = read_model(build(family, tmp_path)).module
    tokens = np.random.default_rng(1).integers(0, 280, size=(1, 14))
    other_start = tokens.copy()
    other_start[0, 0] += 1
    logits, moved = (model(mx.array(ids))[0, -8:].astype(mx.float32) for ids in (tokens, other_start))
    log_probabilities = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    entropy = -mx.sum(mx.exp(log_probabilities) * log_probabilities, axis=-1)
    assert mx.isfinite(logits).all()
    assert 1.5 < entropy.mean().item() < 4.5
    assert 4.0 < mx.abs(logits).max().item() < 15.0
    assert mx.abs(logits - moved).max(axis=-1).min().item() > 1e-3


@pytest.mark.parametrize(("family", "kinds"), CACHES.items())
def test_makes_the_caches_it_is_there_for(family: str, kinds: set[type], tmp_path: Path) -> None:
    model, _ = mlx_lm.load(str(build(family, tmp_path)))
    assert {type(cache) for cache in make_prompt_cache(model)} == kinds


def test_the_seed_alone_decides_the_bytes(tmp_path: Path) -> None:
    first, again, other = (build("llama", tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (first / file).read_bytes() == (again / file).read_bytes()
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


def test_overrides_reach_the_config_and_the_shapes(tmp_path: Path) -> None:
    directory = build("llama", tmp_path, num_hidden_layers=2, vocab_size=400)
    assert json.loads((directory / "config.json").read_text())["vocab_size"] == 400
    layers = linear_layers(directory)
    assert layers["lm_head"] == (400, 64)
    assert "model.layers.1.mlp.up_proj" in layers
    assert "model.layers.2.mlp.up_proj" not in layers


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_layers_are_those_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    directory = build(family, tmp_path)
    model = read_model(directory).module
    layers = linear_layers(directory)
    loaded = {path: module.weight.shape for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert layers == loaded
    assert any(out != width for out, width in layers.values())


def test_tokenizer_keeps_every_byte_and_knows_chat(tmp_path: Path) -> None:
    directory = build("qwen3", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = "hello the world, naïve 🦊\n\tand \x00 more"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode("the")) == 1
    assert len(tokenizer.encode("🦊")) == 4
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|user|>hi<|end|><|assistant|>"
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(chat))[0] == "<|user|>"
    assert tokenizer.eos_token == "<|end|>"
    assert len(tokenizer) < json.loads((directory / "config.json").read_text())["vocab_size"]
    _, wrapped = mlx_lm.load(str(directory))
    assert wrapped.eos_token_ids == {tokenizer.eos_token_id}
    assert all(tokenizer.convert_tokens_to_ids(token) is not None for token in SPECIAL_TOKENS)


@pytest.mark.parametrize("targets", [None, ("q_proj", "down_proj")])
def test_both_adapter_formats_hold_the_adapter_mlx_lm_applies(targets: tuple[str, ...] | None, tmp_path: Path) -> None:
    directory = build("llama", tmp_path / "model")
    layers = linear_layers(directory)
    peft, _ = random_adapter(layers, rank=3, seed=5, scale=1.5, kind="peft", targets=targets)
    tensors, config = random_adapter(layers, rank=3, seed=5, scale=1.5, kind="mlx", targets=targets)
    tokens = mx.array(np.random.default_rng(2).integers(0, 280, size=(1, 20)))
    base, _ = mlx_lm.load(str(directory))
    before = base(tokens)
    adapted = load_adapters(base, str(save_adapter(tmp_path / "adapter", tensors, config)))
    adapted.eval()
    after = adapted(tokens)
    merged, _ = mlx_lm.load(str(directory))
    for name in [name for name in peft if name.endswith("lora_A.weight")]:
        path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        product = 1.5 * mx.array(peft[name.replace("lora_A", "lora_B")]) @ mx.array(peft[name])
        layer = dict(merged.named_modules())[path]
        layer.weight = layer.weight + product
    assert mx.abs(after - before).max().item() > 0.5
    assert_near(after, merged(tokens))


def test_rank_stabilised_config_means_the_same_scale() -> None:
    layers = {"model.layers.0.self_attn.q_proj": (96, 64)}
    plain, config = random_adapter(layers, rank=4, seed=0, scale=2.0)
    same, stabilised = random_adapter(layers, rank=4, seed=0, scale=2.0, rslora=True)
    assert all(np.array_equal(plain[name], same[name]) for name in plain)
    assert config["lora_alpha"] / 4 == stabilised["lora_alpha"] / 2 == 2.0
