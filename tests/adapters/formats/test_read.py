"""Reading whole files: what is accepted, what it is called by content, and every wrong upload's sentence."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from adapters.bundle import AdapterBundle
from adapters.errors import AdapterDoesNotFit, AdapterError, AdapterUnreadable, AdapterUnsupported
from adapters.formats.read import read_bundle
from tests.support.adapter_files import file_of
from tests.support.tiny_models import random_adapter

LAYERS = {
    "model.layers.0.self_attn.q_proj": (10, 6),
    "model.layers.0.mlp.down_proj": (6, 14),
    "model.layers.1.self_attn.q_proj": (10, 6),
    "model.layers.1.mlp.down_proj": (6, 14),
    "lm_head": (20, 6),
}
"""path → (out, in)"""
PREFIX = "base_model.model.model.layers"


def adapter(**fields: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Rank 2 on q_proj and down_proj, in PEFT's format."""
    tensors, config = random_adapter(LAYERS, 2, 0, targets=["q_proj", "down_proj"])
    return tensors, config | fields


def read(tensors: dict[str, np.ndarray], config: dict[str, Any] | None, **options: Any) -> AdapterBundle:
    return read_bundle(save(tensors), config, layers=LAYERS, **options)


def faults(tensors: dict[str, np.ndarray], config: dict[str, Any], **options: Any) -> str:
    with pytest.raises(AdapterDoesNotFit) as caught:
        read(tensors, config, **options)
    assert len(caught.value.message) < 2000
    return "\n".join(caught.value.faults)


# ---- what a bundle says -------------------------------------------------------------------------------------------


def test_a_bundle_tells_what_it_holds() -> None:
    tensors, config = adapter()
    bundle = read(tensors, config)
    assert bundle.spec.kind == "lora"
    assert {(m.rank, m.scale) for m in bundle.spec.modules.values()} == {(2, 2.0)}
    assert bundle.rank == 2 and len(bundle.spec.modules) == 4
    assert bundle.nbytes == sum(value.nbytes for value in tensors.values())
    a = bundle.tensors["model.layers.0.mlp.down_proj.lora_A"]
    assert a.dtype == "F32" and np.array_equal(a.array, tensors[f"{PREFIX}.0.mlp.down_proj.lora_A.weight"])
    with pytest.raises(ValueError, match="read-only"):
        a.array[0, 0] = 1
    with pytest.raises(TypeError):
        bundle.tensors["x"] = a  # type: ignore[index]


def test_the_norm_is_that_of_the_full_product() -> None:
    tensors, config = random_adapter(LAYERS, 3, 1, scale=1.7)
    squares = [
        np.square(1.7 * (tensors[name.replace("lora_A", "lora_B")].astype(np.float64) @ a)).sum()
        for name, a in tensors.items()
        if "lora_A" in name
    ]
    assert read(tensors, config).delta_norm == pytest.approx(np.sqrt(sum(squares)), rel=1e-6)


def test_a_zero_delta_is_accepted_and_reported() -> None:
    tensors, config = adapter()
    tensors[f"{PREFIX}.1.mlp.down_proj.lora_B.weight"][:] = 0
    bundle = read(tensors, config)
    assert bundle.zero_modules == ("model.layers.1.mlp.down_proj",)
    for name in tensors:
        if "lora_B" in name:
            tensors[name][:] = 0
    bundle = read(tensors, config)
    assert len(bundle.zero_modules) == 4 and bundle.delta_norm == 0


# ---- the digest ---------------------------------------------------------------------------------------------------


def test_the_digest_is_the_hash_that_the_contract_describes() -> None:
    a, b = np.arange(8, dtype="<f2").reshape(2, 4), np.arange(6, dtype="<f2").reshape(3, 2)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q"]}
    bundle = read_bundle(save({"q.lora_B.weight": b, "q.lora_A.weight": a}), config, layers={"q": (3, 4)})
    text = b'{"kind":"lora","modules":{"q":{"rank":2,"scale":11.313708}}}'  # 16/√2, shortest for a float32.
    text += b"q.lora_A F16 [2,4]\n" + a.tobytes() + b"q.lora_B F16 [3,2]\n" + b.tobytes()
    assert bundle.digest == "sha256:" + hashlib.sha256(text).hexdigest()


def test_order_format_and_spelling_of_targets_do_not_change_the_digest() -> None:
    tensors, config = adapter()
    digest = read(tensors, config).digest
    backwards = dict(reversed(tensors.items()))
    plain = {name.removeprefix("base_model.model."): value for name, value in tensors.items()}
    named = {name.replace(".weight", ".default.weight"): value for name, value in tensors.items()}
    for same in (backwards, plain, named):
        assert read(same, config).digest == digest
    for targets in (r".*\.(q_proj|down_proj)", [p for p in LAYERS if "layers" in p], "all-linear"):
        assert read(tensors, config | {"target_modules": targets}).digest == digest
    mlx_tensors, mlx_config = random_adapter(LAYERS, 2, 0, kind="mlx", targets=["q_proj", "down_proj"])
    assert read(mlx_tensors, mlx_config).digest == digest
    assert read_bundle(file_of(tensors, config), None, layers=LAYERS).digest == digest
    stabilised, rs_config = random_adapter(LAYERS, 2, 0, targets=["q_proj", "down_proj"], rslora=True)
    assert read(stabilised, rs_config).digest == digest


@pytest.mark.parametrize("change", ["bit", "scale", "dtype", "target"])
def test_content_changes_the_digest(change: str) -> None:
    tensors, config = adapter()
    digest = read(tensors, config).digest
    if change == "bit":
        name = f"{PREFIX}.0.mlp.down_proj.lora_A.weight"
        tensors[name] = np.nextafter(tensors[name], np.float32(9))
    elif change == "scale":
        config["lora_alpha"] = 4.0001
    elif change == "dtype":
        tensors = {name: value.astype(np.float16) for name, value in tensors.items()}
    else:
        config["target_modules"] = ["q_proj"]
        tensors = {name: value for name, value in tensors.items() if "q_proj" in name}
    assert read(tensors, config).digest != digest


# ---- files that are none ------------------------------------------------------------------------------------------

GOOD = save(adapter()[0])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "not a complete safetensors file"),
        (GOOD[:5], "not a complete safetensors file"),
        (GOOD[:100], "not a complete safetensors file"),
        (GOOD[:-1], "not a complete safetensors file"),
        (GOOD + b"\0", "not a complete safetensors file"),
        (struct.pack("<Q", 2 << 30) + GOOD[8:], "not a safetensors file"),
        (struct.pack("<Q", 2**64 - 1) + GOOD[8:], "not a safetensors file"),
        (pickle.dumps({"q.lora_A.weight": [1.0] * 40}), "pickle"),
        (b"PK\x03\x04" + bytes(100), "pickle"),
        (b"<html>not found</html>" * 9, "not a safetensors file"),
        (struct.pack("<Q", 2) + b"[]", "not a safetensors file"),
        (struct.pack("<Q", 2) + b"{}", "no tensors"),
        (GOOD.replace(b'"F32"', b'"F99"', 1), "not a safetensors file"),
    ],
)
def test_junk_is_unreadable(content: bytes, sentence: str) -> None:
    with pytest.raises(AdapterUnreadable, match=sentence):
        read_bundle(content, adapter()[1], layers=LAYERS)


def test_mangled_files_never_crash() -> None:
    """Every fault of a mangled file is an AdapterError; what still reads holds finite values of the right shapes."""
    tensors, config = adapter()
    content = file_of(tensors, config)
    header = 8 + int.from_bytes(content[:8], "little")
    random = np.random.default_rng(0)
    accepted = 0
    for _ in range(600):
        mangled = bytearray(content)
        for _ in range(random.integers(1, 4)):
            where = int(random.integers(0, header if random.random() < 0.8 else len(mangled)))
            mangled[where] = int(random.integers(0, 256)) if random.random() < 0.5 else mangled[where - 1]
        try:
            bundle = read_bundle(memoryview(bytes(mangled)), None, layers=LAYERS)
        except AdapterError as error:
            assert error.message
        else:
            accepted += 1
            assert all(tensor.finite() for tensor in bundle.tensors.values())
            assert all(bundle.tensors[f"{p}.lora_A"].array.shape == (m.rank, LAYERS[p][1]) for p, m in specs(bundle))
    assert accepted < 300


def specs(bundle: AdapterBundle) -> list[tuple[str, Any]]:
    return list(bundle.spec.modules.items())


# ---- adapters that do not fit -------------------------------------------------------------------------------------


def test_all_faults_are_listed_at_once() -> None:
    tensors, config = adapter()
    config["target_modules"] = ["q_proj", "down_proj", "lm_head"]
    del tensors[f"{PREFIX}.0.self_attn.q_proj.lora_B.weight"]
    tensors[f"{PREFIX}.0.mlp.down_proj.lora_A.weight"] = np.zeros((2, 13), np.float32)
    tensors[f"{PREFIX}.1.self_attn.q_proj.lora_A.weight"][1, 1] = np.nan
    tensors[f"{PREFIX}.1.self_attn.q_proj.lora_B.weight"] = np.zeros((2, 10), np.float32)
    tensors[f"{PREFIX}.1.mlp.down_proj.lora_A.weight"] = np.zeros((3, 14), np.float32)
    tensors[f"{PREFIX}.1.mlp.down_proj.lora_B.weight"] = np.zeros((6, 2), np.float64)
    tensors[f"{PREFIX}.9.mlp.down_proj.lora_A.weight"] = np.zeros((2, 14), np.float32)
    tensors["model.norm.weight"] = np.zeros(6, np.float32)
    expected = [
        "model.norm.weight is unexpected: it is no lora_A or lora_B weight.",
        "lm_head is targeted by the configuration, but the file has no tensors for it.",
        "model.layers.0.self_attn.q_proj.lora_B.weight is missing: the file has only "
        "model.layers.0.self_attn.q_proj.lora_A.weight.",
        f"{PREFIX}.0.mlp.down_proj.lora_A.weight has shape [2, 13] but must be [2, 14].",
        f"{PREFIX}.1.mlp.down_proj.lora_A.weight has shape [3, 14] but must be [2, 14]: the configuration says rank 2.",
        f"{PREFIX}.1.mlp.down_proj.lora_B.weight has dtype F64; F32, F16, BF16 are served.",
        f"{PREFIX}.1.self_attn.q_proj.lora_A.weight holds values that are not finite (NaN or infinity).",
        f"{PREFIX}.1.self_attn.q_proj.lora_B.weight has shape [2, 10] but must be [10, 2]: it looks transposed.",
        f"{PREFIX}.9.mlp.down_proj.lora_A.weight is unexpected: the base has no adaptable layer "
        "model.layers.9.mlp.down_proj.",
    ]
    assert faults(tensors, config).split("\n") == expected


def test_faults_of_an_mlx_file_are_told_in_its_own_words() -> None:
    tensors, config = random_adapter(LAYERS, 2, 0, kind="mlx", targets=["q_proj", "down_proj"])
    del tensors["model.layers.0.self_attn.q_proj.lora_a"]
    tensors["model.layers.1.mlp.down_proj.lora_b"] = np.zeros((6, 2), np.float32)
    tensors["model.layers.1.mlp.down_proj.lora_a"][0, 0] = np.inf
    assert faults(tensors, config).split("\n") == [
        "model.layers.0.self_attn.q_proj.lora_a is missing: the file has only model.layers.0.self_attn.q_proj.lora_b.",
        "model.layers.1.mlp.down_proj.lora_a holds values that are not finite (NaN or infinity).",
        "model.layers.1.mlp.down_proj.lora_b has shape [6, 2] but must be [2, 6]: it looks transposed.",
    ]


@pytest.mark.parametrize(("dtype", "bits"), [(np.float32, 0x7F800000), (np.float16, 0xFC00)])
def test_infinity_is_found_in_every_dtype(dtype: type, bits: int) -> None:
    tensors, config = adapter()
    name = f"{PREFIX}.0.mlp.down_proj.lora_A.weight"
    tensors[name] = tensors[name].astype(dtype)
    tensors[name].reshape(-1).view(f"u{tensors[name].itemsize}")[-1] = bits
    assert name in faults(tensors, config)


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0x7F81])
def test_infinity_and_nan_are_found_in_bf16(bits: int) -> None:
    values = np.full((2, 4), 0x7F7F, "<u2")  # The largest finite one.
    for bad in (None, bits):
        if bad is not None:
            values[1, 3] = bad
        header = {
            "q.lora_A.weight": {"dtype": "BF16", "shape": [2, 4], "data_offsets": [0, 16]},
            "q.lora_B.weight": {"dtype": "F32", "shape": [3, 2], "data_offsets": [16, 40]},
        }
        text = json.dumps(header).encode()
        content = struct.pack("<Q", len(text)) + text + values.tobytes() + bytes(24)
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"]}
        if bad is None:
            assert read_bundle(content, config, layers={"q": (3, 4)}).zero_modules == ("q",)
        else:
            with pytest.raises(AdapterDoesNotFit, match=r"q\.lora_A\.weight holds values that are not finite"):
                read_bundle(content, config, layers={"q": (3, 4)})


def test_targets_that_match_nothing() -> None:
    tensors, config = adapter(target_modules=["attention.query"])
    told = faults(tensors, config)
    assert "['attention.query'], which is no layer of this base" in told
    assert "down_proj, lm_head, q_proj" in told


def test_a_flood_of_faults_is_cut_with_a_count() -> None:
    tensors, config = adapter()
    tensors |= {f"stray.{i}": np.zeros(1, np.float32) for i in range(2100)}
    with pytest.raises(AdapterDoesNotFit) as caught:
        read(tensors, config)
    assert len(caught.value.faults) == 2001
    assert caught.value.faults[-1] == "100 more faults are not listed."


# ---- configurations -----------------------------------------------------------------------------------------------


def test_the_configuration_may_be_missing_or_broken() -> None:
    tensors, _ = adapter()
    for content, sentence in [
        (save(tensors), "no adapter configuration"),
        (save(tensors, metadata={"adapter_config": "{"}), "not JSON"),
        (save(tensors, metadata={"adapter_config": "[" * 100_000}), "not JSON"),
        (save(tensors, metadata={"adapter_config": "[1]"}), "must be a JSON object"),
        (save(tensors, metadata={"adapter_config": '{"r": 1, "r": 2}'}), "'r' is there twice"),
    ]:
        with pytest.raises(AdapterUnreadable, match=sentence):
            read_bundle(content, None, layers=LAYERS)


def test_the_format_is_detected_and_a_wrong_claim_is_refused() -> None:
    tensors, config = adapter()
    assert read(tensors, config, format="peft").digest == read(tensors, config).digest
    with pytest.raises(AdapterUnreadable, match="given as mlx, but the configuration is one of peft"):
        read(tensors, config, format="mlx")
    with pytest.raises(AdapterUnreadable, match="no format 'gguf'"):
        read(tensors, config, format="gguf")
    with pytest.raises(AdapterUnreadable, match="mixes fields"):
        read(tensors, config | {"fine_tune_type": "lora"})
    with pytest.raises(AdapterUnreadable, match="Neither the configuration nor the tensor names"):
        read({"x": np.zeros(2, np.float32)}, {})
    with pytest.raises(AdapterUnreadable, match="lora_parameters is missing"):
        read({"x.lora_a": np.zeros(2, np.float32)}, {})


def test_kinds_that_are_not_known_are_refused_by_name() -> None:
    with pytest.raises(AdapterUnsupported, match="kind 'soup' is not known") as caught:
        read({"model.layers.0.mlp.down_proj.weight": np.zeros((6, 14), np.float32)}, {"kind": "soup"})
    assert caught.value.fields == ("kind",)


def test_memoryviews_are_read_too() -> None:
    tensors, config = adapter()
    content = save(tensors)
    assert read_bundle(memoryview(content), config, layers=LAYERS).digest == read(tensors, config).digest


def test_a_header_whose_length_begins_like_a_pickle_is_read() -> None:
    tensors, config = adapter()
    text = json.loads(GOOD[8 : 8 + int.from_bytes(GOOD[:8], "little")])
    data = GOOD[8 + int.from_bytes(GOOD[:8], "little") :]
    header = json.dumps(text).encode().ljust(0x0480)
    content = struct.pack("<Q", len(header)) + header + data
    assert content.startswith(b"\x80\x04")
    assert read_bundle(content, config, layers=LAYERS).digest == read(tensors, config).digest
