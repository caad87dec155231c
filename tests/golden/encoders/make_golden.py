"""Writes the golden files of encoders: tiny checkpoints as transformers saves them, a passage of every kind, and what
torch computes with them.

`make golden-encoders`, or `python -m tests.golden.encoders.make_golden [ENCODER…]` where torch is installed. Weights
are float16 in the files and float32 in both computations.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from tests.support.peers import encoders

HERE = Path(__file__).parent
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
SIZES = {
    "distilbert": {"dim": 16, "hidden_dim": 24, "n_heads": 2, "n_layers": 2},
    "modernbert": {**SMALL, "num_hidden_layers": 3, "local_attention": 8},
    "modernbert, mean": {**SMALL, "num_hidden_layers": 3},
}
CHOSEN = ("bert", "roberta", "distilbert", "modernbert", "modernbert, mean", "deberta-v2", "deberta-v3")
POSITIONS = 48
LENGTHS = (41, 1, 17, 24, 8)
LABELS = 3


def main() -> None:
    for name in sys.argv[1:] or CHOSEN:
        for task in encoders.CLASSES:
            with tempfile.TemporaryDirectory() as place:
                write(name, task, Path(place), HERE / name.replace(", ", "-") / task)


def write(name: str, task: encoders.Task, scratch: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    sizes = {**SIZES.get(name, SMALL), "max_position_embeddings": POSITIONS}
    encoders.build(name, task, scratch, labels=LABELS, grid=torch.float16, saved=torch.float16, **sizes)
    shutil.copy(scratch / "model.safetensors", target)
    shutil.copy(scratch / "config.json", target)
    model = encoders.load(scratch, task)
    types = getattr(model.config, "type_vocab_size", 0)
    read = encoders.passages(LENGTHS, types=types, pad=model.config.pad_token_id)
    found = encoders.computed(model, task, read)
    save_file(
        {
            "ids": np.concatenate([passage.ids for passage in read]).astype(np.int32),
            "types": np.concatenate([passage.types or (0,) * len(passage.ids) for passage in read]).astype(np.int32),
            "lengths": np.array(LENGTHS, np.int32),
            "values": np.concatenate([values.reshape(-1, values.shape[-1]) for values in found]),
        },
        target / "reference.safetensors",
    )


if __name__ == "__main__":
    main()
