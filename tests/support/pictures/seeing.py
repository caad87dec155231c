"""Drives the real engine on the vision models of tests/golden, with the pictures and conversations that torch read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import numpy as np

from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.model.load import load
from rollout_server.engine.model.resident import ResidentModel
from rollout_server.engine.sight.features import Eyes
from rollout_server.models.vision.family import Features, Grid, VisionFamily
from rollout_server.text.pictures.picture import Picture
from tests.support.engine.driver import Driver
from tests.support.golden_vision import CONVERSATIONS, Reference, copied
from tests.support.numbers.bounds import Network
from tests.support.tiny_models import VOCAB_SIZE

DEEPEST = Network(6, 128, VOCAB_SIZE)
"""Tower and decoder one behind the other."""
MOST = 1e-4
"""What is promised of every family, however large a log-probability is."""


@dataclass(frozen=True)
class Conversation:
    """Token ids and the pictures among them."""

    ids: tuple[int, ...]
    pictures: tuple[Picture, ...]
    logprobs: np.ndarray
    """float32 [N - 1], torch's, of the tokens behind the first."""
    logits: np.ndarray
    """float32 [V], torch's, behind the last."""
    adapted: np.ndarray
    """`logprobs` under the adapter of tests/golden."""

    @property
    def within(self) -> float:
        return min(MOST, DEEPEST.of_logprobs(self.logprobs, len(self.ids)))


@dataclass(frozen=True)
class FailingTower:
    """A family whose tower raises at some pictures, for as long as they stand in `at`."""

    family: VisionFamily
    at: list[Picture]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.family, name)

    def features(self, pixels: mx.array, grid: Grid) -> Features:
        shown = np.array(pixels).tobytes()
        if any(shown == picture.pixels for picture in self.at):
            raise ValueError("the tower stumbles")
        return self.family.features(pixels, grid)


@dataclass(frozen=True)
class Seeing:
    """A vision model in memory, and what it is shown."""

    path: Path
    model: ResidentModel
    conversations: dict[str, Conversation]

    def start(self, *, fails_at: list[Picture] | None = None, **options: Any) -> Driver:
        """An engine whose features of pictures, and whose parameters, are its own: another may have left a set of its
        versions mounted. Its tower raises at the pictures that stand in `fails_at`."""
        eyes = self.model.eyes
        if eyes is None:
            raise RuntimeError("The golden model was loaded without its tower.")
        family = eyes.family if fails_at is None else FailingTower(eyes.family, fails_at)
        fresh = Eyes(family, self.model.dtype, self.model.info.kv_bytes_per_token)
        model = replace(self.model, eyes=fresh, module=deepcopy(self.model.module))
        if "kv_memory" in options:
            model = replace(model, info=replace(model.info, kv_memory=options.pop("kv_memory")))
        return Driver.start(self.path, model, **options)


@contextmanager
def opened(family: str, **options: Any) -> Iterator[Seeing]:
    with TemporaryDirectory() as directory:
        path, reference = copied(family, Path(directory) / family), Reference.of(family)
        model = load(EngineOptions(str(path), family, max_batch=8, **options))
        pictures = [picture_of(reference, number, model) for number in (0, 1)]
        found = {name: conversation_of(reference, name, pictures) for name in CONVERSATIONS}
        yield Seeing(path, model, found)


def picture_of(reference: Reference, number: int, model: ResidentModel) -> Picture:
    pixels, grid = reference.pixels(number).astype("<f4"), reference.grid(number)
    tokens = model.eyes.family.tokens(grid) if model.eyes is not None else 0
    return Picture(f"sha256:{number:064x}", pixels.tobytes(), pixels.shape, grid, tokens)


def conversation_of(reference: Reference, name: str, pictures: list[Picture]) -> Conversation:
    shown = tuple(pictures[number] for number in reference.pictures(name))
    arrays = [reference.arrays[f"{name}.{part}"] for part in ("logprobs", "logits", "lora")]
    return Conversation(tuple(reference.ids(name)), shown, *arrays)
