"""Pictures as transformers' own image processor of a model makes them, on the host: the one that needs Pillow alone,
whatever else is installed, so that pixels do not depend on the machine."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from transformers import AutoImageProcessor
from transformers.image_utils import ChannelDimension
from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from rollout_server.engine.model.checkpoint.files import read_config
from rollout_server.engine.model.vision.load import settled
from rollout_server.models.vision.families import kind_of
from rollout_server.models.vision.family import Grid, VisionFamily
from rollout_server.models.vision.vit import side
from rollout_server.text.pictures import placeholders
from rollout_server.text.pictures.decode import BROKEN, decoded, measured, said
from rollout_server.text.pictures.picture import Picture
from rollout_server.text.pictures.placeholders import Placeholders
from rollout_server.text.pictures.reader import Measure

log = logging.getLogger("rollout_server.engine.model")

FILES = ("preprocessor_config.json", "processor_config.json")
"""Where transformers keeps what an image processor is told."""
Cut = Callable[[Mapping[str, Any]], tuple[np.ndarray, Grid]]
"""From what the processor gives for one picture to the pixels that the tower takes, and their grid."""
Foretell = Callable[[Any, int, int], Grid]
"""From the processor, a width and a height to the grid that it will give."""


@dataclass(frozen=True, slots=True)
class ModelPictures:
    """The pictures of one model: a `PictureReader`."""

    processor: Any
    options: Mapping[str, Any]
    """What its call is told beside the picture."""
    cut: Cut
    foretell: Foretell
    count: Callable[[Grid], int]
    """How many placeholders a grid has; raises `ValueError`."""
    placeholders: Placeholders = field(repr=False)

    def read(self, data: bytes, most_pixels: int) -> Picture:
        image = decoded(data, most_pixels)
        try:
            made = self.processor(images=[image], return_tensors=None, **self.options)
        except BROKEN as error:
            raise _not_taken(image.width, image.height, error) from error
        pixels, grid = self.cut(made)
        array = np.ascontiguousarray(pixels, dtype="<f4")
        content, shape = array.tobytes(), array.shape
        digest = hashlib.sha256(repr((shape, grid)).encode() + content).hexdigest()
        return Picture(f"sha256:{digest}", content, shape, grid, self.count(grid))

    def measure(self, data: bytes, most_pixels: int) -> Measure:
        width, height = measured(data, most_pixels)
        if not getattr(self.processor, "do_resize", True):
            return Measure(width * height, 0)
        try:
            return Measure(width * height, self.count(self.foretell(self.processor, width, height)))
        except BROKEN as error:
            raise _not_taken(width, height, error) from error

    def expand(self, text: str, pictures: Sequence[Picture]) -> str:
        return self.placeholders.expand(text, pictures)


def _not_taken(width: int, height: int, error: BaseException) -> ValueError:
    return ValueError(f"the model's processor does not take its {width} × {height} pixels ({said(error)})")


def read_pictures(
    directory: Path, config: Mapping[str, Any], family: VisionFamily, tokenizer: Any
) -> ModelPictures | None:
    """None where the directory does not say how pictures are made ready, or in a way that is not served, which the log
    then tells: such a model is served, and refuses pictures."""
    if not any((directory / name).is_file() for name in FILES):
        log.warning(
            "%s holds no %s, so that nothing says how its pictures are made ready: it refuses them.",
            directory, FILES[0],
        )  # fmt: skip
        return None
    try:
        processor = AutoImageProcessor.from_pretrained(directory, backend="pil", trust_remote_code=False)
        whole = settled(config)
        make = _FAMILIES[str(config["model_type"])]
        options, cut, foretell, marks = make(whole, family, tokenizer)
        if getattr(processor, "do_pan_and_scan", None):
            raise ValueError("do_pan_and_scan cuts pictures into several, which is not served")
    except (*BROKEN, ImportError) as error:
        log.warning("The image processor of %s cannot be used (%s): pictures are refused.", directory, error)
        return None
    return ModelPictures(processor, options, cut, foretell, family.tokens, marks)


def read_pictures_for(directory: Path, tokenizer: Any) -> ModelPictures | None:
    """As `read_pictures`, of a model whose tower is in another process; None for one without a tower, too. Called on a
    thread that computes nothing else."""
    config = read_config(directory)
    kind = kind_of(config)
    if kind is None:
        return None
    # How many placeholders a grid has does not depend on weights, which are never computed here.
    try:
        with mx.stream(mx.cpu):
            family = kind.make(settled(config))
    finally:
        mx.clear_streams()  # MLX's worker of a thread, left running, can abort the process at its exit.
    return read_pictures(directory, config, family, tokenizer)


Made = tuple[dict[str, Any], Cut, Foretell, Placeholders]


def _qwen(config: Mapping[str, Any], family: VisionFamily, tokenizer: Any) -> Made:
    def cut(made: Mapping[str, Any]) -> tuple[np.ndarray, Grid]:
        return np.asarray(made["pixel_values"]), tuple(int(side) for side in made["image_grid_thw"][0])

    def foretell(processor: Any, width: int, height: int) -> Grid:
        patch, merge, size = processor.patch_size, processor.merge_size, processor.size
        rows, columns = smart_resize(
            height, width, patch * merge, min_pixels=size["shortest_edge"], max_pixels=size["longest_edge"]
        )
        return 1, rows // patch, columns // patch

    return {}, cut, foretell, placeholders.repeated(_spelled(tokenizer, family.placeholder))


def _gemma(config: Mapping[str, Any], family: VisionFamily, tokenizer: Any) -> Made:
    begin, end = (_spelled(tokenizer, config[f"{name}_token_index"]) for name in ("boi", "eoi"))
    marks = placeholders.framed(begin, _spelled(tokenizer, family.placeholder), end)
    return {"do_pan_and_scan": False}, _square(config), _always(config), marks


def _llava(config: Mapping[str, Any], family: VisionFamily, tokenizer: Any) -> Made:
    if config["vision_config"]["model_type"] == "pixtral":
        return _pixtral(config, family, tokenizer)
    marks = placeholders.repeated(_spelled(tokenizer, family.placeholder))
    return {}, _square(config), _always(config), marks


def _square(config: Mapping[str, Any]) -> Cut:
    size = config["vision_config"]["patch_size"]

    def cut(made: Mapping[str, Any]) -> tuple[np.ndarray, Grid]:
        pixels = np.asarray(made["pixel_values"][0])
        return pixels, (pixels.shape[1] // size, pixels.shape[2] // size)

    return cut


def _always(config: Mapping[str, Any]) -> Foretell:
    """Every picture is made to the one square that the tower takes."""
    patches = side(config["vision_config"])
    return lambda processor, width, height: (patches, patches)


def _pixtral(config: Mapping[str, Any], family: VisionFamily, tokenizer: Any) -> Made:
    size, merge = config["vision_config"]["patch_size"], config.get("spatial_merge_size", 1)
    marks = placeholders.in_rows(_spelled(tokenizer, family.placeholder), "[IMG_BREAK]", "[IMG_END]", merge)

    def foretell(processor: Any, width: int, height: int) -> Grid:
        given = processor.size
        most = (given["longest_edge"],) * 2 if given.get("longest_edge") else (given["height"], given["width"])
        # Only the shape of the array is looked at, and this one has one value.
        shaped = np.broadcast_to(np.uint8(0), (3, height, width))
        found = get_resize_output_image_size(shaped, most, size * merge, ChannelDimension.FIRST)
        return found[0] // size, found[1] // size

    return {"patch_size": size * merge}, _square(config), foretell, marks


def _tiled(config: Mapping[str, Any], family: VisionFamily, tokenizer: Any) -> Made:
    def cut(made: Mapping[str, Any]) -> tuple[np.ndarray, Grid]:
        if not np.all(made.get("pixel_attention_mask", 1)):
            raise ValueError("the model's processor does not fill its tiles")
        return np.asarray(made["pixel_values"][0]), (int(made["rows"][0][0]), int(made["cols"][0][0]))

    marks = placeholders.in_tiles(
        _spelled(tokenizer, family.placeholder), "<fake_token_around_image>", "<global-img>", family.tokens((0, 0))
    )

    def foretell(processor: Any, width: int, height: int) -> Grid:
        _, rows, columns = processor.get_number_of_image_patches(height, width)
        return int(rows), int(columns)

    return {"return_row_col_info": True}, cut, foretell, marks


def _spelled(tokenizer: Any, token: int) -> str:
    """Raises `ValueError` for an id that the tokenizer does not know."""
    found = tokenizer.convert_ids_to_tokens(token)
    if not isinstance(found, str):
        raise ValueError(f"the tokenizer has no token {token}, which stands for pictures")
    return found


_FAMILIES: Mapping[str, Callable[[Mapping[str, Any], VisionFamily, Any], Made]] = {
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
    "qwen3_vl_moe": _qwen,
    "gemma3": _gemma,
    "llava": _llava,
    "mistral3": _pixtral,
    "idefics3": _tiled,
    "smolvlm": _tiled,
}
