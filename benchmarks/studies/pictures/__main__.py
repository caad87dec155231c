"""What a picture costs a tower, on random weights of published shapes: Qwen2.5-VL's, Gemma 3's and LLaVA's.

`python -m benchmarks.studies.pictures [--rounds 5] [--layers N] [--dtype bfloat16] [--json]`: milliseconds of one
picture from its pixels to its features, by size; and for Qwen2.5-VL what its windows save, against the same layers that
see the whole picture. A part: no decoder, no HTTP, no processor. `--layers` takes fewer layers, where a device is slow.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rollout_server.machine.blas import load_fast_blas

load_fast_blas()

import mlx.core as mx  # noqa: E402
from mlx.utils import tree_map  # noqa: E402

from rollout_server.models.vision.family import Grid, VisionFamily  # noqa: E402
from rollout_server.models.vision.gemma3 import gemma3  # noqa: E402
from rollout_server.models.vision.llava import llava  # noqa: E402
from rollout_server.models.vision.qwen2_vl import qwen2_5_vl  # noqa: E402

WHOLE = (7, 15, 23, 31)
QWEN: dict[str, Any] = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "hidden_act": "silu",
    "in_channels": 3,
    "temporal_patch_size": 2,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "window_size": 112,
    "out_hidden_size": 2048,
    "rope_parameters": {"rope_theta": 10_000.0},
}
ROPE = {"rope_parameters": {"mrope_section": [16, 24, 24]}, "head_dim": 128}
SIGLIP: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "num_channels": 3,
    "image_size": 896,
    "patch_size": 14,
}
CLIP = SIGLIP | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "image_size": 336,
}
QWEN_GRIDS: tuple[Grid, ...] = ((1, 16, 16), (1, 32, 32), (1, 72, 72))
"""Pictures of 224, 448 and 1,008 pixels a side."""


def qwen(layers: int | None, whole: tuple[int, ...]) -> VisionFamily:
    fields = QWEN | {"fullatt_block_indexes": whole} | ({} if layers is None else {"depth": layers})
    return qwen2_5_vl({"vision_config": fields, "text_config": ROPE, "image_token_id": 0})


def square(make: Any, fields: Mapping[str, Any], layers: int | None) -> tuple[VisionFamily, Grid]:
    shortened = dict(fields) if layers is None else {**fields, "num_hidden_layers": layers}
    side = fields["image_size"] // fields["patch_size"]
    config = {
        "vision_config": shortened,
        "text_config": {"hidden_size": 2560},
        "image_token_id": 0,
        "mm_tokens_per_image": 256,
        "vision_feature_select_strategy": "default",
        "vision_feature_layer": -2,
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
    }
    return make(config), (side, side)


def milliseconds(family: VisionFamily, pixels: mx.array, grid: Grid, dtype: mx.Dtype, rounds: int) -> float:
    """The median of so many, the first of which is not counted."""
    family.tower.update(tree_map(lambda array: array.astype(dtype), family.tower.parameters()))
    mx.eval(family.tower.parameters(), pixels)
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        mx.eval(family.features(pixels, grid).embeddings)
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[1:])


def measure(options: argparse.Namespace) -> Iterator[tuple[str, float]]:
    """What was measured, and its milliseconds, as they come."""
    dtype = getattr(mx, options.dtype)
    for grid in QWEN_GRIDS:
        pixels = mx.random.normal((grid[1] * grid[2], 1176))
        size = f"{grid[1] * 14} × {grid[2] * 14} pixels"
        layers = options.layers or QWEN["depth"]
        for name, whole in (("Qwen2.5-VL", WHOLE), ("Qwen2.5-VL without windows", tuple(range(layers)))):
            family = qwen(options.layers, whole)
            told = f"{name}, {size}, {family.tokens(grid)} tokens"
            yield told, milliseconds(family, pixels, grid, dtype, options.rounds)
    for name, make, fields in (("Gemma 3", gemma3, SIGLIP), ("LLaVA 1.5", llava, CLIP)):
        family, grid = square(make, fields, options.layers)
        pixels = mx.random.normal((3, fields["image_size"], fields["image_size"]))
        size = f"{fields['image_size']} × {fields['image_size']} pixels"
        told = f"{name}, {size}, {family.tokens(grid)} tokens"
        yield told, milliseconds(family, pixels, grid, dtype, options.rounds)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.pictures", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, help="fewer layers than published")
    parser.add_argument("--dtype", default="float32" if mx.default_device() == mx.cpu else "bfloat16")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    options = parser.parse_args()
    if options.json:
        print(json.dumps(dict(measure(options))))
        return 0
    print(f"{options.dtype} on {mx.default_device()}, milliseconds of one picture", flush=True)
    for name, value in measure(options):
        print(f"{name:64} {value:10,.1f}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
