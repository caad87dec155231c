"""What the loader finds out about a base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from rollout_server.engine.kv_cache.padded import PaddedKV
from rollout_server.engine.kv_cache.padded_layer import Attend, DecodeAttention
from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.model.attention.choice import (
    TESTED_COLUMNS,
    UNBOUND,
    Agreed,
    ChosenAttention,
    Trial,
    proven,
)
from rollout_server.engine.model.attention.plain import attend_plainly
from rollout_server.engine.model.digest import base_digest
from rollout_server.engine.model.forward.functions import modules_of
from rollout_server.engine.model.kv_choice import ChosenStore, choose_store
from rollout_server.engine.model.load import load, read_model
from rollout_server.engine.model.resident import ResidentModel
from rollout_server.engine.sampling.numerics import on_cpu
from rollout_server.errors import EngineUnavailable
from tests.engine.model.attention.test_choice import FASTER, Clock
from tests.support import tiny_models
from tests.support.engine.driver import Driver, prompts_of
from tests.support.numbers.bounds import TINY, assert_near


def quantised(source: Path, target: Path, bits: int) -> Path:
    shutil.copytree(source, target)
    model, _ = load_model(source)
    nn.quantize(model, group_size=32, bits=bits)
    mx.save_safetensors(str(target / "model.safetensors"), dict(tree_flatten(model.parameters())))
    config = json.loads((target / "config.json").read_text())
    config["quantization"] = {"group_size": 32, "bits": bits}
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_stays_quantised_under_an_adapter(bits: int, tmp_path: Path) -> None:
    small = tiny_models.build("qwen3", tmp_path / "whole", head_dim=32)
    driver = Driver.start(quantised(small, tmp_path / "packed", bits))
    info = driver.model.info
    assert info.quantization == {"group_size": 32, "bits": bits} and info.dtype == "float32"
    assert info.parameters == load(EngineOptions(str(small), "whole")).info.parameters
    driver.push("p", driver.bundle(1))
    rows = driver.generate(prompts_of([9, 30], 286), n=2, policy="p", max_tokens=10)
    assert rows[0].token_ids != driver.generate(prompts_of([9, 30], 286), n=2, max_tokens=10)[0].token_ids
    scored = driver.score([r.prompt_ids + r.token_ids for r in rows], [len(r.prompt_ids) for r in rows], policy="p")
    for row, score in zip(rows, scored, strict=True):
        assert_near(row.logprobs, score.logprobs, TINY.of_row(row))
    # Nothing was promoted: residual and KV keep the model's dtype.
    assert {layer.keys.dtype for layer in driver.batch(0).store.layers} == {mx.float32}
    assert driver.model.module.layers[0].self_attn.q_proj["base"].weight.dtype == mx.uint32


def test_facts_about_the_base(bare_model: Callable[[str], ResidentModel]) -> None:
    info = bare_model("qwen3").info
    assert (info.model_type, info.dtype, info.cache, info.quantization) == ("qwen3", "float32", "slots", None)
    assert info.max_model_len == 2048 and info.eos_token_ids == (286,)
    assert info.layers["model.layers.0.self_attn.q_proj"] == (96, 64)


def test_two_fine_tunes_of_one_architecture_have_two_digests(tmp_path: Path) -> None:
    """Config, sizes and headers are equal; the bytes are not."""
    one = tiny_models.build("qwen3", tmp_path / "one", seed=1)
    two = tiny_models.build("qwen3", tmp_path / "two", seed=2)
    cache = tmp_path / "digests.json"
    first, second = base_digest(one, cache), base_digest(two, cache)
    assert first != second and first.startswith("sha256:") and len(first) == 71
    assert base_digest(one, cache) == first and base_digest(one, tmp_path / "other.json") == first
    shutil.copytree(one, tmp_path / "copy")
    assert base_digest(tmp_path / "copy", cache) == first
    config = json.loads((one / "tokenizer_config.json").read_text())
    (one / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "x"}))
    assert base_digest(one, cache) not in (first, second)


def test_a_directory_without_a_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_family"}')
    with pytest.raises(EngineUnavailable, match=r"could not be loaded"):
        load(EngineOptions(str(tmp_path), "x"))


def test_ranks_compile_only_where_all_of_them_may(qwen: Path) -> None:
    """One rank's finding is that of all: others would run other forwards."""
    found: list[str | None] = []
    # On a CPU they first agree whose attention it is; a GPU's is tried in tests of its own.
    attention: Literal["auto", "mlx"] = "auto" if on_cpu() else "mlx"
    stages = 3 if on_cpu() else 2

    def agreed(fault: str | None) -> str | None:
        found.append(fault)
        return fault if len(found) < stages else "as rank 1 found"

    module = read_model(qwen).module
    options = EngineOptions(str(qwen), "tiny", attention=attention)
    chosen = choose_store(module, tiny_models.VOCAB_SIZE, options, compiles=True, agreed=agreed)
    assert found == [None] * stages and chosen.kind == "slots" and not chosen.compiles


@pytest.mark.parametrize("attention", ["auto", "mlx"])
def test_a_cpu_computes_by_functions_of_its_own_unless_those_of_mlx_were_asked_for(
    attention: Literal["auto", "mlx"], qwen: Path
) -> None:
    chosen = load(EngineOptions(str(qwen), "tiny", attention=attention)).attention
    if on_cpu():
        assert bool(chosen.modules) == (attention == "auto")
    assert attention == "auto" or (not chosen.modules and chosen.attend is None)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """One layer with a window and one without, with heads of a size that kernels are written for."""
    return read_model(
        tiny_models.build("gemma3_text", tmp_path_factory.mktemp("windowed") / "model", head_dim=64)
    ).module


def chosen_with(kernel: Attend, module: nn.Module, attention: Any = "auto") -> tuple[ChosenStore, list[bool]]:
    """What is chosen where this device had such a kernel, and whether it was asked for one."""
    clock, asked = Clock(), []

    def choose(module: nn.Module, trial: Trial, *, wanted: bool, agreed: Agreed) -> ChosenAttention:
        asked.append(wanted)
        return proven(clock.counting(kernel, FASTER), module, trial, agreed, clock) if wanted else UNBOUND

    options = EngineOptions("nowhere", "tiny", attention=attention)
    return choose_store(module, tiny_models.VOCAB_SIZE, options, compiles=False, choose=choose), asked


def test_rows_attend_by_a_kernel_under_which_the_model_is_what_it_was(windowed: nn.Module) -> None:
    windows: set[int | None] = set()

    def noting(step: DecodeAttention) -> tuple[mx.array, mx.array, mx.array]:
        windows.add(step.window)
        return attend_plainly(step)

    chosen, asked = chosen_with(noting, windowed)
    store = chosen.make(4)
    assert asked == [True] and windows == {16, None}
    assert chosen.attention.attend is not None and chosen.attention.modules == modules_of(windowed)
    assert isinstance(store, PaddedKV) and store.attend is chosen.attention.attend


def test_and_by_the_model_s_own_attention_under_any_other(
    windowed: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong_in_few_columns(step: DecodeAttention) -> tuple[mx.array, mx.array, mx.array]:
        found, keys, values = attend_plainly(step)
        return found[:, ::-1] if step.keys.shape[2] < TESTED_COLUMNS else found, keys, values

    chosen, asked = chosen_with(wrong_in_few_columns, windowed)
    store = chosen.make(4)
    assert asked == [True] and "keep mlx's own attention: under the kernel row " in caplog.text
    assert chosen.kind == "slots" and chosen.attention.attend is None
    assert isinstance(store, PaddedKV) and store.attend is None
    assert chosen_with(attend_plainly, windowed, "mlx")[1] == [False]
