"""config.json exactly as transformers writes it: every way to scale RoPE, windows and activations, against torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

from rollout_server.errors import EngineUnavailable
from tests.peers.conftest import DIFFERENCES, TOLERANCE
from tests.support import tiny_models
from tests.support.engine.driver import Driver
from tests.support.peers import families, reference

ORIGINAL, CONTEXT, LENGTH = 128, 1024, 480
FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "phi3",
    "mixtral",
    "olmo2",
    "olmoe",
    "gpt_oss",
    "granite",
    "smollm3",
    "cohere",
    "seed_oss",
    "stablelm",
    "starcoder2",
    "glm4",
    "gemma2",
)
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"factor": 8.0, "beta_fast": 24.0, "beta_slow": 1.5, "truncate": False},
    "yarn with a factor of its own": {"factor": 8.0, "attention_factor": 0.9},
    "longrope": {"factor": 8.0},
}
STATE = {"num_heads": 8, "head_dim": 12, "state_size": 16}
HYBRID = {"head_dim": 20, "mamba_d_ssm": 96, "mamba_n_heads": 8, "mamba_d_head": 12, "mamba_d_state": 16}
STATE_LAYERS: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 12, "mamba_d_state": 16, "mamba_n_groups": 2}
STATE_LAYERS |= {"layer_types": ["mamba", "attention"], "num_local_experts": 0, "num_experts_per_tok": 0}
STATE_LAYERS |= {"shared_intermediate_size": 53}
# What transformers itself takes for these: the others end in an error of its own.
ONLY = {"phi3": ("default", "longrope"), "mixtral": ("default", "linear", "llama3")}


def rope(family: str, scaling: str) -> dict[str, Any]:
    kind = scaling.partition(" ")[0]
    parameters = {"rope_type": kind, "rope_theta": 700000.0, **SCALINGS[scaling]}
    if kind in ("llama3", "yarn", "longrope"):
        parameters["original_max_position_embeddings"] = ORIGINAL
    own = AutoConfig.for_model(family).rope_parameters
    if "partial_rotary_factor" in own:
        parameters["partial_rotary_factor"] = own["partial_rotary_factor"]
    if kind == "longrope":
        config = {**families.SHARED, **families.FAMILIES[family].config}
        wide = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
        pairs = int(wide * parameters.get("partial_rotary_factor", 1.0)) // 2
        parameters["short_factor"] = [1.0 + 0.1 * i for i in range(pairs)]
        parameters["long_factor"] = [2.0 + 0.3 * i for i in range(pairs)]
    return parameters


def build(family: str, directory: Path, **fields: Any) -> Path:
    more = {"max_position_embeddings": CONTEXT, **fields}
    if family == "falcon_h1":
        more = {**HYBRID, **more}
    if family == "mamba2":
        more = {**STATE, **more}
    if family == "phi3":
        more.setdefault("original_max_position_embeddings", ORIGINAL)
    return families.build(family, directory, **more)


def gap(directory: Path, driver: Driver, length: int) -> float:
    ids = np.random.default_rng(4).integers(0, tiny_models.VOCAB_SIZE, size=length).tolist()
    (scored,) = driver.score([ids])
    (expected,) = reference.logprobs(families.load(directory), [ids])
    return float(np.abs(np.array(scored.logprobs[1:], np.float64) - expected).max())


@pytest.mark.parametrize(
    ("family", "scaling"),
    [(f, s) for f in FAMILIES for s in SCALINGS if s in ONLY.get(f, SCALINGS)],
)
def test_rope_is_that_of_the_file(family: str, scaling: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    directory = build(family, tmp_path, rope_parameters=rope(family, scaling))
    driver = Driver.start(directory)
    # Beyond the original length longrope turns a whole sequence otherwise.
    length = ORIGINAL if scaling == "longrope" else LENGTH
    assert driver.model.info.max_model_len == (ORIGINAL if scaling == "longrope" else CONTEXT)
    found = gap(directory, driver, length)
    table = request.config.stash.setdefault(DIFFERENCES, {})
    table.setdefault(family, {})[scaling] = found
    # An angle is rounded by as many bits as its position has.
    assert found <= TOLERANCE * max(1.0, length / ORIGINAL)


@pytest.mark.parametrize(
    ("family", "fields", "bound"),
    [
        ("mistral", {"sliding_window": 32}, 32),
        ("mixtral", {"sliding_window": 32}, 32),
        ("phi3", {"sliding_window": 31, "original_max_position_embeddings": CONTEXT}, 31),
        ("starcoder2", {"sliding_window": 32}, 32),
        ("gemma2", {"sliding_window": 32}, 32),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}, 32),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 32, "max_window_layers": 1}, CONTEXT),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 0}, 32),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2}, CONTEXT),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 32}, 32),
        ("gemma3_text", {"sliding_window": 32}, CONTEXT),
        ("cohere2", {"sliding_window": 32}, CONTEXT),
        ("olmo3", {"sliding_window": 32}, CONTEXT),
        ("gpt_oss", {"sliding_window": 32}, CONTEXT),
    ],
)
def test_a_window_that_a_family_passes_over_bounds_the_context(
    family: str, fields: dict[str, Any], bound: int, tmp_path: Path
) -> None:
    directory = build(family, tmp_path, **fields)
    driver = Driver.start(directory)
    assert driver.model.info.max_model_len == bound
    assert gap(directory, driver, min(bound, LENGTH)) <= TOLERANCE * LENGTH / ORIGINAL
    if bound < CONTEXT:
        with pytest.raises(EngineUnavailable, match=rf"exact up to {bound}: .*sliding_window"):
            Driver.start(directory, context_length=bound + 1)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
        ("exaone4", {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}),
        ("mamba2", {"n_groups": 1}),
        ("mamba2", {"n_groups": 4}),
        ("granitemoehybrid", STATE_LAYERS),
        ("falcon_h1", {"key_multiplier": 0.4}),
        ("falcon_h1", {"attention_in_multiplier": 0.7, "ssm_in_multiplier": 1.2, "mamba_n_groups": 2}),
        ("falcon_h1", {"key_multiplier": 0.4, "embedding_multiplier": 3.0, "tie_word_embeddings": True}),
    ],
)
def test_layers_are_those_of_the_file(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    directory = build(family, tmp_path, **fields)
    assert gap(directory, Driver.start(directory), 64) <= TOLERANCE


@pytest.mark.parametrize(
    "fields",
    [{"mamba_rms_norm": True, "mamba_n_groups": 2}, {"attention_bias": True}, {"mamba_proj_bias": True}],
)
def test_parts_that_a_family_multiplies_otherwise_are_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailable, match=r"falcon_h1.*(mamba_n_groups is 2|does not multiply biases)"):
        Driver.start(build("falcon_h1", tmp_path, **fields))


@pytest.mark.parametrize("name", ["gelu", "gelu_pytorch_tanh", "relu", "quick_gelu"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "starcoder2", "granite"])
def test_an_activation_is_that_of_the_file(family: str, name: str, tmp_path: Path) -> None:
    directory = build(family, tmp_path, hidden_act=name)
    assert gap(directory, Driver.start(directory), 64) <= TOLERANCE


def test_an_activation_that_cannot_be_put_in_is_refused(tmp_path: Path) -> None:
    directory = build("qwen3_moe", tmp_path, hidden_act="gelu")
    with pytest.raises(EngineUnavailable, match=r"qwen3_moe.* hidden_act is 'gelu', and this family's code has silu"):
        Driver.start(directory)
