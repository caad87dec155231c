"""Writes the golden files of vision models: tiny checkpoints as transformers saves them, two pictures, four
conversations, an adapter on the language half, and what torch and PEFT compute with them.

`make golden-vision`, or `python -m tests.golden.vision.make_golden [FAMILY…]` where torch is installed. Weights are
float16 in the files and float32 in both computations.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.golden.make_golden import save_adapter
from tests.support.peers import vision

HERE = Path(__file__).parent


def main() -> None:
    for name in sys.argv[1:] or vision.VISIONS:
        with tempfile.TemporaryDirectory() as place:
            write(name, Path(place), HERE / name)


def write(name: str, scratch: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    model = vision.build(name, scratch)
    for file in ("model.safetensors", "config.json"):
        shutil.copy(scratch / file, target)
    reference = vision.features(model, name)
    for number, pixels in enumerate(vision.pixels_of(name)):
        reference[f"pixels.{number}"] = pixels
        reference[f"grid.{number}"] = np.array(vision.VISIONS[name].grids[number], np.int32)
    for title, (ids, pictures) in vision.conversations(name).items():
        reference[f"{title}.ids"] = np.array(ids, np.int32)
        reference[f"{title}.pictures"] = np.array(pictures, np.int32)
        for part, values in vision.read(model, name, ids, pictures).items():
            reference[f"{title}.{part}"] = values
    adapted = vision.adapted(scratch)
    adapted.save_pretrained(scratch / "lora")
    save_adapter(scratch / "lora", target / "lora.safetensors")
    for title, (ids, pictures) in vision.conversations(name).items():
        found = vision.read(adapted.base_model.model, name, ids, pictures)
        reference[f"{title}.lora"] = found["logprobs"]
    save_file({key: np.ascontiguousarray(value) for key, value in reference.items()}, target / "reference.safetensors")


if __name__ == "__main__":
    main()
