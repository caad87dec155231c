"""Our encoders against what torch computed with the checkpoints beside this file, which `make_golden.py` wrote."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from rollout_server.engine.model.encoders.passages import Passage
from rollout_server.engine.model.encoders.pooling import Pooling
from rollout_server.engine.model.encoders.reading import read
from tests.support.golden_encoders import CHECKPOINTS, opened
from tests.support.numbers.bounds import Network, assert_near

HERE = Path(__file__).parent
NETWORK = Network(3, 24, 3)


def passages(reference: dict[str, np.ndarray]) -> list[Passage]:
    ends = np.cumsum(reference["lengths"])[:-1]
    ids, types = (np.split(reference[name], ends) for name in ("ids", "types"))
    return [Passage(tuple(a.tolist()), tuple(b.tolist()) if b.any() else ()) for a, b in zip(ids, types, strict=True)]


def expected(task: str, reference: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Of a vector: the mean of a passage's states."""
    if task == "classify":
        return list(reference["values"])
    found = np.split(reference["values"], np.cumsum(reference["lengths"])[:-1])
    return found if task == "token_classify" else [states.astype(np.float64).mean(axis=0) for states in found]


def test_five_families_have_a_checkpoint_for_every_task() -> None:
    names = [name.rpartition("/") for name in CHECKPOINTS]
    assert {name for name, _, _ in names} >= {"bert", "roberta", "distilbert", "modernbert", "deberta-v2", "deberta-v3"}
    assert len(CHECKPOINTS) == len({name for name, _, _ in names}) * 3
    assert sum(path.stat().st_size for path in HERE.rglob("*.safetensors")) <= 900_000


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_numbers_are_those_of_transformers(checkpoint: str, tmp_path: Path) -> None:
    model = replace(opened(checkpoint, tmp_path), pooling=Pooling(("mean",), normalise=False))
    reference = load_file(HERE / checkpoint / "reference.safetensors")
    wanted = expected(model.task, reference)
    given = passages(reference)
    longest = int(reference["lengths"].max())
    together = read(model, given, 10_000)
    alone = [read(model, [passage], 10_000)[0] for passage in given]
    for found in (together, alone, read(model, given, 50)):
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours.dtype == np.float32 and ours.shape == theirs.shape
            assert_near(ours, theirs, NETWORK.of_logits(theirs, longest), checkpoint)
            assert np.abs(ours - theirs).max() <= 1e-4
