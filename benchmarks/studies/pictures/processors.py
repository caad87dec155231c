"""How far pixels of transformers' two image processors lie apart: the one that needs Pillow alone, which the server
takes, and the one that a trainer with torchvision gets unless it asks for `backend="pil"`.

`python -m benchmarks.studies.pictures.processors`, where torch and torchvision are installed: for each family's
processor as published, the largest and the mean difference of four pictures' values, in steps of 1/255 before they are
normalised.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoImageProcessor

from tests.support.pictures.files import drawn

SQUARE = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen2-VL and Qwen2.5-VL": {"image_processor_type": "Qwen2VLImageProcessor"},
    "Qwen3-VL": {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 16, **HALF},
    "Gemma 3": {"image_processor_type": "Gemma3ImageProcessor"},
    "LLaVA 1.5": {"image_processor_type": "CLIPImageProcessor", **SQUARE},
    "Pixtral and Mistral 3": {"image_processor_type": "PixtralImageProcessor"},
    "Idefics3": {"image_processor_type": "Idefics3ImageProcessor"},
    "SmolVLM": {"image_processor_type": "SmolVLMImageProcessor"},
}
SIZES = ((500, 375), (640, 480), (224, 224), (1200, 900))


def differences(fields: dict[str, Any]) -> np.ndarray:
    """How far each value of each picture lies apart, in steps of 1/255."""
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "preprocessor_config.json").write_text(json.dumps(fields))
        ours, theirs = (AutoImageProcessor.from_pretrained(place, backend=name) for name in ("pil", "torchvision"))
    found = []
    for size in SIZES:
        image = drawn(*size)
        first, second = (
            np.asarray(processor(images=[image], return_tensors=kind)["pixel_values"], np.float64)
            for processor, kind in ((ours, "np"), (theirs, "pt"))
        )
        found.append(np.abs(first - second).ravel())
    return np.concatenate(found) * min(ours.image_std) * 255


def main() -> int:
    print("| processor | largest difference | mean |")
    print("|---|---|---|")
    for name, fields in PUBLISHED.items():
        found = differences(fields)
        print(f"| {name} | {found.max():.1f} | {found.mean():.3f} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
