"""What cannot be loaded is refused in one sentence, and no code of a model is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rollout_server.engine.loading import read_model
from rollout_server.errors import EngineUnavailable
from tests import tiny_models

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

    damaged = tiny_models.build("qwen3", tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert f"The model at {damaged} (qwen3) could not be loaded: " in refusal(damaged)

    other = tiny_models.build("qwen3", tmp_path / "other")
    change(other / "config.json", model_type="no_such_family")
    assert refusal(other).endswith("(no_such_family) could not be loaded: Model type no_such_family not supported.")

    fewer = tiny_models.build("qwen3", tmp_path / "fewer")
    change(fewer / "config.json", num_hidden_layers=4)
    assert len(refusal(fewer)) < 700
