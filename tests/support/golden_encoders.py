"""The checkpoints of tests/golden/encoders as directories that can be opened: any encoder, without torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, processors

from rollout_server.engine.model.encoders.encoder import EncoderModel
from rollout_server.engine.model.encoders.load import read_encoder
from rollout_server.engine.model.encoders.passages import Passage
from tests.support.tiny_models import write_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "encoders"
CHECKPOINTS = sorted(path.parent.relative_to(GOLDEN).as_posix() for path in GOLDEN.glob("*/*/reference.safetensors"))


def copied(checkpoint: str, directory: Path, *, without: Sequence[str] = (), **changed: Any) -> Path:
    """A checkpoint with a tokenizer in `directory`, made if missing, its values in float32. `changed` are fields of
    config.json, None for one that is taken away; `without` are tensors that are left out."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = load_file(GOLDEN / checkpoint / "model.safetensors")
    kept = {name: array.astype(np.float32) for name, array in tensors.items() if name not in without}
    save_file(kept, directory / "model.safetensors")
    config = json.loads((GOLDEN / checkpoint / "config.json").read_text()) | changed
    said = {name: value for name, value in config.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(said))
    write_tokenizer(directory)
    return directory


def with_template(directory: Path) -> Path:
    """Its tokenizer puts special tokens around a text and between those of a pair, and tells them apart by types."""
    path = directory / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    first, last = ((name, tokenizer.token_to_id(name)) for name in ("<|user|>", "<|end|>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first[0]} $A {last[0]}",
        pair=f"{first[0]} $A {last[0]} $B:1 {last[0]}:1",
        special_tokens=[first, last],
    )
    tokenizer.save(str(path))
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def with_roberta_template(directory: Path) -> Path:
    """As published RoBERTa has it: two special tokens between the texts of a pair, and no types."""
    path = directory / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    first, last = ((name, tokenizer.token_to_id(name)) for name in ("<|user|>", "<|end|>"))
    tokenizer.post_processor = processors.RobertaProcessing(last, first, add_prefix_space=False)
    tokenizer.save(str(path))
    return directory


def cross_encoder(directory: Path) -> Path:
    """A model with one label that reads pairs, and their types."""
    return with_template(one_label(directory, "bert"))


def one_label(directory: Path, family: str) -> Path:
    """The first label of a golden classifier."""
    copied(f"{family}/classify", directory, id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0})
    tensors = load_file(directory / "model.safetensors")
    last = "classifier.out_proj." if family == "roberta" else "classifier."
    head = {name: array[:1] for name, array in tensors.items() if name.startswith(last)}
    save_file({**tensors, **head}, directory / "model.safetensors")
    return directory


def opened(checkpoint: str, directory: Path, **changed: Any) -> EncoderModel:
    return read_encoder(copied(checkpoint, directory, **changed))


def passages(model: EncoderModel, *lengths: int, seed: int = 7) -> list[Passage]:
    """Random ones, the second half of each of another type where the model has several."""
    generator = np.random.default_rng(seed)
    kinds = 1 if model.limits.token_types > 1 else 0
    return [
        Passage(
            tuple(generator.integers(4, model.limits.vocabulary, size=length).tolist()),
            tuple(int(at >= length // 2) * kinds for at in range(length)),
        )
        for length in lengths
    ]
