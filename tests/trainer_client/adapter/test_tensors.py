from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors import deserialize, safe_open
from safetensors.numpy import save_file

from trainer_client.adapter.tensors import host_tensor, host_tensors, read_adapter, safetensors_body
from trainer_client.wire.call import CHUNK_BYTES, Body

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


class OnDevice:
    """An array of a framework that only offers `__array__`."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.values


def test_the_library_reads_back_every_dtype_and_shape() -> None:
    draw = np.random.default_rng(0)
    tensors = {
        "matrix": draw.normal(size=(3, 5)).astype(np.float32),
        "half": draw.normal(size=(7,)).astype(np.float16),
        "scalar": np.array(1.5, np.float32),
        "transposed": draw.normal(size=(4, 2)).astype(np.float32).T,
        "big_endian": np.arange(4, dtype=">f4"),
        "bytes": np.arange(5, dtype=np.uint8),
        "empty": np.zeros((0, 3), np.float32),
        "duck": OnDevice(np.arange(6, dtype=np.float32).reshape(2, 3)),
    }
    read = dict(deserialize(bytes(safetensors_body(host_tensors(tensors), CONFIG))))
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        expected = np.asarray(tensor)
        dtype = expected.dtype.newbyteorder("<")
        assert tuple(read[name]["shape"]) == expected.shape
        assert bytes(read[name]["data"]) == np.ascontiguousarray(expected, dtype).tobytes(), name


def test_bfloat16_keeps_its_bits() -> None:
    values = mx.array([[1.0, -2.5, 3.140625], [0.0, 1e30, -1e-30]], dtype=mx.bfloat16)
    for array in (values, values.T, values[0, 0]):
        assert host_tensor("x", array).shape == tuple(array.shape)
        tensor = host_tensor("x", array)
        assert tensor.dtype == "BF16"
        assert tensor.array.flags.c_contiguous
        widened = (tensor.array.astype(np.uint32) << 16).view(np.float32)
        assert np.array_equal(widened, np.array(array.astype(mx.float32)))
    body = bytes(safetensors_body({"x": host_tensor("x", values)}, CONFIG))
    assert dict(deserialize(body))["x"]["dtype"] == "BF16"


def test_mlx_arrays_need_no_conversion_by_the_caller() -> None:
    array = mx.arange(6, dtype=mx.float16).reshape(2, 3)
    assert np.array_equal(host_tensor("x", array).array, np.arange(6).reshape(2, 3))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_an_mlx_array_is_sent_from_its_own_memory(dtype: mx.Dtype) -> None:
    array = mx.random.normal((64, 48)).astype(dtype)
    mx.eval(array)
    before = mx.get_active_memory()
    tensors = [host_tensor("x", array) for _ in range(2)]
    assert np.shares_memory(tensors[0].array, tensors[1].array)
    # What other tests left behind may be freed meanwhile.
    assert mx.get_active_memory() <= before


def test_the_config_travels_in_the_metadata(tmp_path: Path) -> None:
    class Task(StrEnum):
        CAUSAL = "CAUSAL_LM"

    config = {"r": np.int64(2), "target_modules": {"v_proj", "q_proj"}, "task_type": Task.CAUSAL, "path": Path("m")}
    path = tmp_path / "a.safetensors"
    path.write_bytes(bytes(safetensors_body(host_tensors({"x": np.zeros(1, np.float32)}), config)))
    with safe_open(path, "np") as file:
        read = json.loads(file.metadata()["adapter_config"])
    assert read == {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "path": "m"}


def test_a_config_that_json_cannot_say_is_refused() -> None:
    with pytest.raises(TypeError, match="holds a object"):
        safetensors_body(host_tensors({"x": np.zeros(1, np.float32)}), {"r": object()})


@pytest.mark.parametrize("tensor", [np.array(["a"]), np.zeros(2, np.complex128), None, "text"])
def test_what_is_no_array_of_numbers_is_refused_by_name(tensor: Any) -> None:
    with pytest.raises(TypeError, match=r"'layer\.q'"):
        host_tensor("layer.q", tensor)


def test_no_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match="no tensors"):
        host_tensors({})


def test_a_body_is_sent_in_bounded_pieces_and_can_be_sent_again() -> None:
    big = np.arange(CHUNK_BYTES // 2, dtype=np.float32)
    body = safetensors_body(host_tensors({"x": big, "y": np.ones(3, np.float32)}), CONFIG)
    first = list(body.chunks())
    assert max(map(len, first)) <= CHUNK_BYTES
    assert b"".join(first) == b"".join(body.chunks()) == bytes(body)
    assert len(body) == len(bytes(body))
    assert len(Body()) == 0


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapters.safetensors"])
def test_a_directory_is_read_as_it_was_saved(tmp_path: Path, name: str) -> None:
    weights = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    save_file({"x": weights}, tmp_path / name)
    assert read_adapter(tmp_path)[1] is None
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    tensors, config = read_adapter(tmp_path)
    assert np.array_equal(tensors["x"].array, weights)
    assert config == CONFIG


def test_a_bfloat16_file_keeps_its_bits(tmp_path: Path) -> None:
    values = mx.array([1.0, -2.5], dtype=mx.bfloat16)
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), {"x": values})
    tensor = read_adapter(tmp_path)[0]["x"]
    assert tensor.dtype == "BF16"
    assert np.array_equal(tensor.array, host_tensor("x", values).array)


def test_broken_directories_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a directory"):
        read_adapter(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="neither"):
        read_adapter(tmp_path)
    for name in ("adapter_model.safetensors", "adapters.safetensors"):
        save_file({"x": np.zeros(1, np.float32)}, tmp_path / name)
    with pytest.raises(FileNotFoundError, match="both"):
        read_adapter(tmp_path)
    (tmp_path / "adapters.safetensors").unlink()
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="JSON object"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        read_adapter(tmp_path)
