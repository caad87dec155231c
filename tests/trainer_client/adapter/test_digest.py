from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from adapters.formats.read import read_bundle
from adapters.spec import Parameter, Scoring
from trainer_client.adapter.digest import adapter_digest
from trainer_client.adapter.tensors import host_tensors, safetensors_body

RANK = 3
LAYERS = {
    "model.layers.0.self_attn.q_proj": (8, 8),
    "model.layers.0.mlp.down_proj": (8, 12),
    "model.layers.1.self_attn.q_proj": (8, 8),
    "model.layers.1.mlp.down_proj": (8, 12),
}
"""path → (out, in); square and not."""


def pairs(dtype: str = "float32") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """path → (A [r, in], B [out, r])"""
    draw = np.random.default_rng(7)
    return {
        path: (draw.normal(size=(RANK, wide)).astype(dtype), draw.normal(size=(out, RANK)).astype(dtype))
        for path, (out, wide) in LAYERS.items()
    }


def as_peft(dtype: str = "float32") -> dict[str, Any]:
    named = {}
    for path, (a, b) in pairs(dtype).items():
        named[f"base_model.model.{path}.lora_A.weight"] = a
        named[f"base_model.model.{path}.lora_B.weight"] = b
    return named


def as_mlx(dtype: str = "float32") -> dict[str, Any]:
    named = {}
    for path, (a, b) in pairs(dtype).items():
        named[f"{path}.lora_a"] = a.T
        named[f"{path}.lora_b"] = b.T
    return named


def with_magnitudes(tensors: dict[str, Any], suffix: str) -> dict[str, Any]:
    """The same adapter as DoRA; `suffix` is `lora_magnitude_vector` or `m`."""
    draw = np.random.default_rng(8)
    prefix = "" if suffix == "m" else "base_model.model."
    return tensors | {f"{prefix}{path}.{suffix}": draw.random(out, dtype="f4") for path, (out, _) in LAYERS.items()}


def peft_config(**fields: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"], **fields}


def mlx_config(scale: float = 16 / RANK) -> dict[str, Any]:
    keys = ["self_attn.q_proj", "mlp.down_proj"]
    parameters = {"rank": RANK, "scale": scale, "dropout": 0.0, "keys": keys}
    return {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}


def digest(tensors: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    return adapter_digest(host_tensors(tensors), config)


def test_it_is_the_hash_that_the_contract_describes() -> None:
    a, b = np.arange(6, dtype="<f4").reshape(2, 3), np.arange(8, dtype="<f4").reshape(4, 2)
    given = digest({"q.lora_B.weight": b, "q.lora_A.weight": a}, {"peft_type": "LORA", "r": 2, "lora_alpha": 4})
    text = b'{"kind":"lora","modules":{"q":{"rank":2,"scale":2.0}}}'
    text += b"q.lora_A F32 [2,3]\n" + a.tobytes() + b"q.lora_B F32 [4,2]\n" + b.tobytes()
    assert given == "sha256:" + hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize(
    ("tensors", "config"),
    [
        (as_peft(), peft_config()),
        (as_peft(), peft_config(use_rslora=True)),
        (as_peft(), peft_config(target_modules="all-linear")),
        (as_peft(), peft_config(alpha_pattern={"mlp.down_proj": 5, "down_proj": 9, "0.self_attn.q_proj": 0.1})),
        (as_peft("float16"), peft_config()),
        ({name: mx.array(value, dtype=mx.bfloat16) for name, value in as_peft().items()}, peft_config()),
        (as_mlx(), mlx_config()),
        (as_mlx(), mlx_config(1 / 3)),
        ({name: mx.array(value) for name, value in as_mlx().items()}, mlx_config(20.0)),
        (with_magnitudes(as_peft("float16"), "lora_magnitude_vector"), peft_config(use_dora=True)),
        (with_magnitudes(as_mlx(), "m"), mlx_config() | {"fine_tune_type": "dora"}),
    ],
    ids=["peft", "rslora", "all-linear", "patterns", "f16", "bf16", "mlx", "mlx scale", "mlx arrays", "dora", "mlx m"],
)
def test_the_server_computes_the_same_from_what_is_sent(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    host = host_tensors(tensors)
    bundle = read_bundle(bytes(safetensors_body(host, config)), None, layers=LAYERS)
    assert adapter_digest(host, config) == bundle.digest


def test_ranks_by_module_agree_with_the_server() -> None:
    tensors = as_peft()
    for name in list(tensors):
        if "layers.1.mlp" in name:
            tensors[name] = tensors[name][:2] if "lora_A" in name else tensors[name][:, :2]
    config = peft_config(rank_pattern={"1.mlp.down_proj": 2})
    host = host_tensors(tensors)
    bundle = read_bundle(bytes(safetensors_body(host, config)), None, layers=LAYERS)
    assert {spec.rank for spec in bundle.spec.modules.values()} == {2, 3}
    assert adapter_digest(host, config) == bundle.digest


def test_one_adapter_in_both_formats_and_any_order_has_one_digest() -> None:
    expected = digest(as_peft(), peft_config())
    assert digest(as_mlx(), mlx_config()) == expected
    assert digest(dict(reversed(as_peft().items())), peft_config(lora_dropout=0.1)) == expected
    unwrapped = {name.removeprefix("base_model.model."): value for name, value in as_peft().items()}
    assert digest(unwrapped, peft_config()) == expected
    named = {name.replace(".weight", ".default.weight"): value for name, value in as_peft().items()}
    assert digest(named, peft_config()) == expected


def test_dora_has_one_digest_in_both_formats_and_not_that_of_lora() -> None:
    magnitudes = with_magnitudes(as_peft(), "lora_magnitude_vector")
    expected = digest(magnitudes, peft_config(use_dora=True))
    assert expected not in (None, digest(as_peft(), peft_config()))
    assert digest(with_magnitudes(as_mlx(), "m"), mlx_config() | {"fine_tune_type": "dora"}) == expected
    named = {name.replace("_vector", "_vector.default.weight"): value for name, value in magnitudes.items()}
    assert digest(named, peft_config(use_dora=True)) == expected


def test_what_changes_the_weights_changes_it() -> None:
    expected = digest(as_peft(), peft_config())
    square = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    changed = as_peft()
    changed[square] = changed[square].copy()
    changed[square][0, 0] = np.nextafter(changed[square][0, 0], 1)
    fewer = {name: value for name, value in as_peft().items() if "layers.1" not in name}
    seen = [
        expected,
        digest(changed, peft_config()),
        digest(fewer, peft_config()),
        digest(as_peft(), peft_config(lora_alpha=8)),
        digest(as_peft(), peft_config(use_rslora=True)),
        digest(as_peft("float16"), peft_config()),
    ]
    assert len(set(seen)) == len(seen)


def test_a_transposed_square_half_changes_it() -> None:
    square = np.arange(9, dtype=np.float32).reshape(3, 3)
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 3}
    assert digest({"q.lora_A.weight": square, "q.lora_B.weight": square}, config) != digest(
        {"q.lora_A.weight": square.T, "q.lora_B.weight": square}, config
    )


def test_the_scale_is_the_shortest_decimal_of_its_float32() -> None:
    a, b = np.zeros((3, 2), "<f4"), np.zeros((2, 3), "<f4")
    given = digest({"q.lora_A.weight": a, "q.lora_B.weight": b}, {"peft_type": "LORA", "r": 3, "lora_alpha": 1})
    head = json.dumps({"kind": "lora", "modules": {"q": {"rank": 3, "scale": 0.33333334}}}, separators=(",", ":"))
    text = head.encode() + b"q.lora_A F32 [3,2]\n" + a.tobytes() + b"q.lora_B F32 [2,3]\n" + b.tobytes()
    assert given == "sha256:" + hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize(
    ("tensors", "config"),
    [
        (as_peft(), peft_config(use_dora=True)),
        ({**as_peft(), "base_model.model.q.lora_magnitude_vector": np.ones(3, np.float32)}, peft_config()),
        (as_mlx(), {"fine_tune_type": "dora", "lora_parameters": {"rank": 3, "scale": 1.0}}),
        (as_mlx(), {"fine_tune_type": "lora", "lora_parameters": {"rank": 3}}),
    ],
    ids=["no magnitudes", "magnitude", "mlx no magnitudes", "no scale"],
)
def test_what_it_is_not_defined_for_has_none(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    assert digest(tensors, config) is None


@pytest.mark.parametrize(
    "layer", ["model.layers.0.mlp.experts.3.up_proj", "model.layers.0.mlp.experts", "model.language_model.layers.0.q"]
)
def test_it_is_left_to_the_server_where_only_that_knows_the_base_s_names(layer: str) -> None:
    tensors = {f"base_model.model.{layer}.lora_{half}.weight": np.ones((2, 2), np.float32) for half in "AB"}
    assert digest(tensors, {"peft_type": "LORA", "r": 2, "lora_alpha": 4}) is None
    plain = {name.replace(layer, "model.layers.0.q"): value for name, value in tensors.items()}
    assert digest(plain, {"peft_type": "LORA", "r": 2, "lora_alpha": 4}) is not None
    assert digest(plain, {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_parameters": ["q.weight"]}) is None


@pytest.mark.parametrize("kind", ["delta", "full", "mlx", "modules_to_save", "base_layer"])
def test_dense_tensors_have_the_name_of_the_parameter(kind: str) -> None:
    """The server's digest of the same file, which stands on the path of each parameter."""
    head, bias = np.ones((10, 8), "<f2"), np.arange(8, dtype="<f4")
    layers = LAYERS | {"lm_head": (10, 8)}
    parameters = {"lm_head.weight": Parameter((10, 8), "float32"), "model.norm.weight": Parameter((8,), "float32")}
    tensors: dict[str, Any] = {"lm_head.weight": head, "model.norm.weight": bias}
    config: dict[str, Any] = {"kind": kind}
    named: dict[str, Any]
    if kind == "mlx":
        config = {"fine_tune_type": "full", "num_layers": -1}
    elif kind == "modules_to_save":
        named = {"base_model.model.lm_head.modules_to_save.default.weight": head}
        named["base_model.model.model.norm.weight"] = bias
        tensors, config = as_peft() | named, peft_config(modules_to_save=["lm_head", "norm"])
    elif kind == "base_layer":
        a, b = np.ones((RANK, 8), "f4"), np.ones((10, RANK), "f4")
        named = {f"lm_head.{part}.weight": v for part, v in (("lora_A", a), ("lora_B", b), ("base_layer", head))}
        tensors, config = as_peft() | named, peft_config(target_modules=["q_proj", "down_proj", "lm_head"])
    host = host_tensors(tensors)
    body = bytes(safetensors_body(host, config))
    assert adapter_digest(host, config) == read_bundle(body, None, layers=layers, parameters=parameters).digest
    if kind == "full":
        text = b'{"kind":"full","modules":{}}lm_head.weight F16 [10,8]\n' + head.tobytes()
        text += b"model.norm.weight F32 [8]\n" + bias.tobytes()
        assert adapter_digest(host, config) == "sha256:" + hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS"])
def test_a_head_is_part_of_what_is_hashed(task_type: str) -> None:
    """As PEFT saves a reward model: client and server agree, and another head is another version."""
    config = peft_config(task_type=task_type, modules_to_save=["classifier", "score"])
    scoring = Scoring(width=8)
    digests = []
    for value in (1.0, 2.0):
        head = {"base_model.model.score.weight": np.full((2, 8), value, np.float32)}
        tensors = as_peft() | head
        bundle = read_bundle(
            bytes(safetensors_body(host_tensors(tensors), config)), None, layers=LAYERS, scoring=scoring
        )
        assert digest(tensors, config) == bundle.digest
        digests.append(bundle.digest)
    assert digests[0] != digests[1] != digest(as_peft(), peft_config())
