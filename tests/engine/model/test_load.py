"""What cannot be loaded is refused in one sentence that names the file or the field, and no code of a model is run."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rollout_server.engine.model.load import read_model
from rollout_server.errors import EngineUnavailable
from tests.support import tiny_models

CODE = "from pathlib import Path\nPath(__file__).with_name('it-ran').touch()\nraise SystemExit\n"


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refusal(directory: Path) -> str:
    with pytest.raises(EngineUnavailable) as refused:
        read_model(directory)
    assert "\n" not in refused.value.message
    return refused.value.message


def test_code_of_a_model_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where there is somebody to ask, transformers would ask.
    monkeypatch.setattr("builtins.input", lambda *said: "y")
    own_model = tiny_models.build("qwen3", tmp_path / "model")
    change(own_model / "config.json", model_file="own.py")
    own_tokenizer = tiny_models.build("qwen3", tmp_path / "tokenizer")
    (own_tokenizer / "tokenizer.json").unlink()
    auto_map = {"AutoTokenizer": ["own.OwnTokenizer", None]}
    change(own_tokenizer / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=auto_map)
    for directory, said in (
        (own_model, "needs code of its own to be run, which this server never does"),
        (own_tokenizer, "It brings code of its own, which this server never runs."),
    ):
        (directory / "own.py").write_text(CODE)
        assert said in refusal(directory)
        assert not (directory / "it-ran").exists()


def test_what_mlx_lm_cannot_load_is_named(tmp_path: Path) -> None:
    packed = tiny_models.build("qwen3", tmp_path / "packed")
    change(
        packed / "config.json", quantization_config={"quant_method": "compressed-tensors", "format": "float-quantized"}
    )
    said = refusal(packed)
    assert "(qwen3) could not be loaded: unsupported compressed-tensors format 'float-quantized'" in said
    assert said.endswith("Its weights are packed by compressed-tensors, of which mlx-lm reads a part only.")

    other = tiny_models.build("qwen3", tmp_path / "other")
    change(other / "config.json", model_type="no_such_family")
    assert refusal(other).endswith("(no_such_family) could not be loaded: Model type no_such_family not supported.")

    fewer = tiny_models.build("qwen3", tmp_path / "fewer")
    change(fewer / "config.json", num_hidden_layers=4)
    assert len(refusal(fewer)) < 700


def test_a_family_s_own_error_is_told_as_one(tmp_path: Path) -> None:
    model = tiny_models.build("gemma3_text", tmp_path / "gemma")
    kinds = ["sliding_attention", "sliding_attention", "sliding_attention", "sliding_attention"]
    change(model / "config.json", sliding_window_pattern=0, layer_types=kinds)
    said = refusal(model)
    assert (
        "(gemma3_text) could not be loaded: mlx-lm's gemma3_text cannot be made from these values of config.json"
        in said
    )
    assert "Error: " in said


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    data = content.encode() if isinstance(content, str) else content
    return lambda directory: (directory / name).write_bytes(data) and None


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:size]) and None


def replaced_by_a_directory(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").mkdir()


def without_tokenizer(directory: Path) -> None:
    for path in directory.glob("tokenizer*"):
        path.unlink()


INDEX = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
BROKEN: dict[str, tuple[Callable[[Path], None], str, str]] = {
    # what happened → (how, the file, what is said)
    "config cut off": (cut("config.json", 60), "config.json", "is not JSON, or cut off: .* at line"),
    "config empty": (write("config.json", ""), "config.json", "is empty"),
    "config a list": (write("config.json", "[1]"), "config.json", "has to hold an object, and holds a list"),
    "config not text": (write("config.json", b"\xff\xfe\x00"), "config.json", "is not text in UTF-8"),
    "config nested deeply": (write("config.json", "[" * 99999), "config.json", "is nested too deeply"),
    "weights empty": (write("model.safetensors", ""), "model.safetensors", "is empty"),
    "weights a few bytes": (write("model.safetensors", "abc"), "model.safetensors", "is no safetensors file"),
    "weights another format": (write("model.safetensors", b"PK" * 99), "model.safetensors", "is no safetensors file"),
    "weights without header": (cut("model.safetensors", 1000), "model.safetensors", "is cut off: 1000 bytes"),
    "weights cut off": (cut("model.safetensors", 50000), "model.safetensors", "is cut off: 50000 of [0-9]+ bytes"),
    "weights a directory": (replaced_by_a_directory, "model.safetensors", "is a directory"),
    "a shard missing": (
        write("model.safetensors.index.json", json.dumps(INDEX)),
        "model.safetensors.index.json",
        "names model-00002-of-00002.safetensors, which is not there",
    ),
    "index without map": (write("model.safetensors.index.json", "{}"), "index.json", "has no weight_map"),
    "tokenizer empty": (write("tokenizer.json", "{}"), "tokenizer.json", "holds no tokenizer"),
    "tokenizer cut off": (cut("tokenizer.json", 99), "tokenizer.json", "is not JSON, or cut off"),
    "tokenizer config": (write("tokenizer_config.json", "{,"), "tokenizer_config.json", "is not JSON"),
    "no tokenizer": (without_tokenizer, "", "holds no tokenizer .*save_pretrained"),
    "generation config": (write("generation_config.json", "{"), "generation_config.json", "is not JSON"),
    "end token a word": (
        write("generation_config.json", '{"eos_token_id": "</s>"}'),
        "generation_config.json",
        "says eos_token_id is '</s>': it has to be a token id",
    ),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_a_broken_file_is_named(name: str, tmp_path: Path) -> None:
    how, file, said = BROKEN[name]
    directory = tiny_models.build("qwen3", tmp_path)
    how(directory)
    message = refusal(directory)
    assert str(directory) in message and file in message
    assert re.search(said, message), message
    assert "Error" not in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_attention_heads", 0),
        ("num_attention_heads", "4"),
        ("num_hidden_layers", -1),
        ("hidden_size", 64.5),
        ("vocab_size", True),
        ("num_key_value_heads", []),
        ("max_position_embeddings", 0),
    ],
)
def test_a_size_that_is_none_is_named(field: str, value: Any, tmp_path: Path) -> None:
    directory = tiny_models.build("llama", tmp_path)
    change(directory / "config.json", **{field: value})
    assert re.search(rf"config.json says {field} is .*: it has to be a whole number of at least 1", refusal(directory))


@pytest.mark.parametrize(
    ("family", "field"),
    [("llama", "model_type"), ("internlm2", "hidden_size"), ("lille-130m", "n_head"), ("plamo", "vocab_size")],
)
def test_a_field_that_is_missing_is_named_and_no_argument_of_python(family: str, field: str, tmp_path: Path) -> None:
    # transformers does not know these families, so it has no values of its own for what is missing.
    directory = tiny_models.build("llama", tmp_path)
    config = json.loads((directory / "config.json").read_text()) | {"model_type": family}
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != field}))
    message = refusal(directory)
    assert field in message and "__init__" not in message and "TypeError" not in message


def test_a_template_that_cannot_be_read_is_said_and_no_reason_not_to_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tiny_models.build("qwen3", tmp_path)
    change(directory / "tokenizer_config.json", chat_template="{% for m in messages %}{{ m.content }}")
    with caplog.at_level(logging.WARNING):
        read_model(directory)
    assert "chat template" in caplog.text and "line 1" in caplog.text
