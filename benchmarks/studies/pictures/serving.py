"""What seeing costs who serves: text beside a tower that nobody uses, and rows that each show a picture.

`python -m benchmarks.studies.pictures.serving [--rounds 5] [--rows 32]`: on a random Qwen2.5-VL whose decoder is the
benchmarks' size. First the tokens a second of text prompts, with the tower beside the decoder and without, in turns.
Then as many rows with one picture of 64 tokens each: the whole time when no picture was seen before, and when all were,
whose difference is the tower's. A part: no HTTP, no processor.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from rollout_server.machine.blas import load_fast_blas

load_fast_blas()

import numpy as np  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

from benchmarks.contenders.engine import Engine  # noqa: E402
from benchmarks.model import SHAPE, random_prompts, widen_tokenizer  # noqa: E402
from rollout_server.engine.model.vision.load import settled  # noqa: E402
from rollout_server.models.vision.families import kind_of  # noqa: E402
from rollout_server.rollout import PolicyAddress, RolloutRequest, SamplingParams, row_seed  # noqa: E402
from rollout_server.text.pictures.picture import Picture  # noqa: E402
from tests.support.golden_vision import GOLDEN  # noqa: E402
from tests.support.tiny_models import build  # noqa: E402

NEW_TOKENS, TEXT, GRID = 32, 96, (1, 16, 16)
TOWER: dict[str, Any] = {
    "depth": 8,
    "hidden_size": 320,
    "intermediate_size": 860,
    "num_heads": 4,
    "patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [3, 7],
    "out_hidden_size": SHAPE["hidden_size"],
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.pictures.serving")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each, taken in turns")
    parser.add_argument("--rows", type=int, default=32)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plain, seeing = write_pair(Path(folder))
        with (
            Engine(plain, options.rows, prefix_cache=False) as text,
            Engine(seeing, options.rows, prefix_cache=False) as vision,
        ):
            placeholder = placeholder_of(seeing)
            for line in unused(text, vision, options, placeholder) + shown(vision, options, placeholder):
                print(line, flush=True)
    return 0


def unused(text: Engine, vision: Engine, options: Any, placeholder: int) -> list[str]:
    """Text prompts on both."""
    prompts = words(options.rows, TEXT, placeholder)
    groups = [group(row, prompt) for row, prompt in enumerate(prompts)]
    for engine in (text, vision):
        seconds(engine, groups)
    pairs = [(seconds(text, groups), seconds(vision, groups)) for _ in range(options.rounds)]
    tokens = options.rows * NEW_TOKENS
    rates = [tokens / statistics.median(column) for column in zip(*pairs, strict=True)]
    ratio = statistics.median(plain / seeing for plain, seeing in pairs)
    return [f"text without a tower {rates[0]:.1f} tok/s, beside one {rates[1]:.1f} tok/s, ratio {ratio:.3f}"]


def shown(vision: Engine, options: Any, placeholder: int) -> list[str]:
    """Rows with a picture each, new ones every round, and the same ones again."""
    generator, count = np.random.default_rng(4), GRID[1] * GRID[2] // 4
    prompts = words(options.rows, TEXT - count, placeholder)
    first, again = [], []
    for number in range(options.rounds + 1):
        groups = []
        for row, prompt in enumerate(prompts):
            pixels = generator.standard_normal((GRID[1] * GRID[2], 3 * 2 * 14 * 14)).astype("<f4")
            picture = Picture(f"{number}/{row}", pixels.tobytes(), pixels.shape, GRID, count)
            ids = [*prompt[:8], *[placeholder] * count, *prompt[8:]]
            groups.append(group(row, ids, (picture,)))
        measured = seconds(vision, groups), seconds(vision, groups)
        if number:
            first.append(measured[0])
            again.append(measured[1])
    tower = statistics.median(one - other for one, other in zip(first, again, strict=True))
    whole, kept = statistics.median(first), statistics.median(again)
    return [
        f"{options.rows} rows with a new picture each {whole:.2f} s, with one seen before {kept:.2f} s",
        f"the tower: {1e3 * tower / options.rows:.1f} ms a picture, {100 * tower / whole:.0f} % of the whole",
    ]


def words(rows: int, length: int, placeholder: int) -> list[list[int]]:
    """Random prompts that show nothing."""
    return [[id if id != placeholder else 0 for id in prompt] for prompt in random_prompts(rows, length)]


def group(row: int, ids: list[int], pictures: tuple[Picture, ...] = ()) -> RolloutRequest:
    sampling = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    return RolloutRequest(
        "bench", tuple(ids), sampling, PolicyAddress("base"), prompt_index=row, seeds=(row_seed(1, row, 0),),
        pictures=pictures,
    )  # fmt: skip


def seconds(engine: Engine, groups: list[RolloutRequest]) -> float:
    began = time.perf_counter()
    engine.rollouts(groups)
    return time.perf_counter() - began


def write_pair(folder: Path) -> tuple[Path, Path]:
    """The same decoder as a model of text, and with a tower beside it."""
    shape = {name: value for name, value in SHAPE.items() if name != "head_dim"}
    plain, seeing = build("qwen2", folder / "text", **shape), folder / "vision"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        seeing.mkdir(exist_ok=True)
        (seeing / name).write_bytes((plain / name).read_bytes())
    widen_tokenizer(plain / "tokenizer.json")
    widen_tokenizer(seeing / "tokenizer.json")
    text = json.loads((plain / "config.json").read_text())
    config = json.loads((GOLDEN / "qwen2_5_vl" / "config.json").read_text())
    rope = {"rope_type": "default", "rope_theta": text["rope_theta"], "mrope_section": [8, 12, 12]}
    own = {name: value for name, value in text.items() if name != "model_type"}
    kept = {name: value for name, value in config["text_config"].items() if name != "layer_types"}
    config["text_config"] = kept | own | {"rope_parameters": rope}
    config["vision_config"] = config["vision_config"] | TOWER
    config |= {"tie_word_embeddings": text["tie_word_embeddings"], "vocab_size": text["vocab_size"]}
    (seeing / "config.json").write_text(json.dumps(config))
    kind = kind_of(config)
    if kind is None:
        raise RuntimeError("The model that is measured has no tower.")
    generator, tensors = np.random.default_rng(0), load_file(plain / "model.safetensors")
    for name, value in tree_flatten(kind.make(settled(config)).tower.parameters()):
        drawn = generator.standard_normal(value.shape).astype(np.float32)
        scaled = drawn / np.sqrt(value.shape[-1]) if value.ndim > 1 else 1 + 0.1 * drawn
        tensors[f"visual.{name}"] = scaled.astype(np.float32)
    save_file(tensors, seeing / "model.safetensors")
    return plain, seeing


def placeholder_of(directory: Path) -> int:
    found: int = json.loads((directory / "config.json").read_text())["image_token_id"]
    return found


if __name__ == "__main__":
    raise SystemExit(main())
