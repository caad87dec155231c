"""Passages in one forward: each gets what it would get by itself, its own version's, and its own fault."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from adapters.bundle import Content
from adapters.prepare import prepare
from adapters.resident.model_layers import replaceable_parameters
from adapters.resident.residency import ResidentVersions
from adapters.resident.slots import AdapterSlots
from rollout_server.engine.model.encoders.passages import Passage
from rollout_server.engine.model.encoders.reading import forward, padding_fault, read, results
from rollout_server.errors import NonFiniteLogits
from rollout_server.models.encoders.heads import Headed
from tests.laws.grids import corners, some_long
from tests.support.adapter_files import make, merge
from tests.support.golden_encoders import CHECKPOINTS, opened, passages
from tests.support.numbers.bounds import Network, assert_near

NETWORK = Network(3, 24, 3)
CLASSIFIERS = [name for name in CHECKPOINTS if name.endswith("/classify")]
SOME = [CLASSIFIERS[0], CLASSIFIERS[-1]]


@pytest.mark.parametrize("checkpoint", some_long(CHECKPOINTS, *CHECKPOINTS[::3]))
def test_a_passage_gets_what_it_gets_by_itself(checkpoint: str, tmp_path: Path) -> None:
    model = opened(checkpoint, tmp_path)
    given = passages(model, 1, 46, 7, 7, 33, 8, 2)
    for budget in (1, 60, 10_000):
        for passage, found in zip(given, read(model, given, budget), strict=True):
            (alone,) = read(model, [passage], 10_000)
            assert found.shape == alone.shape and found.dtype == np.float32
            assert_near(found, alone, NETWORK.of_logits(alone, 46), f"{checkpoint}, {budget}")


@pytest.mark.parametrize(("checkpoint", "dora"), corners(CLASSIFIERS, [False, True]))
def test_rows_of_several_versions_share_a_forward(checkpoint: str, dora: bool, tmp_path: Path) -> None:
    model = opened(checkpoint, tmp_path)
    linear = {path: shape for path, shape in model.layers.items() if "embed" not in path}
    bundles = [make(linear, seed=seed, rank=3, dora=dora) for seed in (1, 2)]
    merged = [opened(checkpoint, tmp_path) for _ in bundles]
    for each, bundle in zip(merged, bundles, strict=True):
        merge(each.module, bundle)
    slots = AdapterSlots(model.module, model.layers, mx.float32)
    staged = [slots.stage(bundle) for bundle in bundles]
    given = passages(model, 30, 25, 28, 29)
    slots.route([staged[0], 0, staged[1], staged[0]])
    found = results(model, forward(model, given, mixed=True), given)
    slots.route([staged[1]] * 4)
    second = read(model, given, 10_000)
    base = opened(checkpoint, tmp_path)
    for ours, by, passage in zip(found, (merged[0], base, merged[1], merged[0]), given, strict=True):
        (theirs,) = read(by, [passage], 100)
        assert_near(ours, theirs, 2 * NETWORK.of_logits(theirs, 30), checkpoint)
    for ours, theirs in zip(second, read(merged[1], given, 10_000), strict=True):
        assert_near(ours, theirs, 2 * NETWORK.of_logits(theirs, 30), checkpoint)
    assert np.abs(second[0] - read(base, given, 10_000)[0]).max() > 0.01


def test_what_is_not_finite_is_told_to_its_owner_alone(tmp_path: Path) -> None:
    model = opened("bert/classify", tmp_path)
    table = model.body.embeddings.word_embeddings
    table.weight = mx.where(mx.arange(320)[:, None] == 77, mx.nan, table.weight)
    good, bad = Passage((5, 6, 7)), Passage((5, 77, 7))
    found = results(model, forward(model, [good, bad, good]), [good, bad, good])
    assert [isinstance(each, NonFiniteLogits) for each in found] == [False, True, False]
    with pytest.raises(NonFiniteLogits):
        read(model, [good, bad], 100)


def test_a_pad_token_inside_a_passage_is_a_token(tmp_path: Path) -> None:
    """As in transformers, whose mask comes from the tokenizer and not from ids."""
    model = opened("bert/classify", tmp_path)
    plain, holed = Passage((9, 8, 7, 6)), Passage((9, 0, 7, 6))
    assert np.abs(read(model, [plain], 99)[0] - read(model, [holed], 99)[0]).max() > 0.01


@pytest.mark.parametrize("checkpoint", some_long(CLASSIFIERS, *SOME))
def test_an_adapter_may_change_the_embedding(checkpoint: str, tmp_path: Path) -> None:
    model = opened(checkpoint, tmp_path)
    bundle = make(model.layers, rank=3, targets=["word_embeddings", "tok_embeddings"])
    merged, base = (opened(checkpoint, tmp_path) for _ in range(2))
    merge(merged.module, bundle)
    slots = AdapterSlots(model.module, model.layers, mx.float32)
    given = passages(model, 30, 25)
    slots.route([slots.stage(bundle), 0])
    found = results(model, forward(model, given, mixed=True), given)
    for ours, by, passage in zip(found, (merged, base), given, strict=True):
        (theirs,) = read(by, [passage], 100)
        assert_near(ours, theirs, 2 * NETWORK.of_logits(theirs, 30), checkpoint)


@pytest.mark.parametrize("checkpoint", some_long(CLASSIFIERS, *SOME))
def test_merged_versions_are_parameter_sets_as_elsewhere(checkpoint: str, tmp_path: Path) -> None:
    model = opened(checkpoint, tmp_path)
    bundle = make({path: shape for path, shape in model.layers.items() if "embed" not in path}, rank=3)
    parameters = replaceable_parameters(model.module, model.layers, "float32")
    versions = ResidentVersions(model.module, model.layers, parameters, mx.float32)
    versions.stage(prepare(bundle, "float32", mode="merged", parameters=parameters), dequantize=False)
    placement = versions.placement(Content(bundle.digest, "merged"))
    merged, given = opened(checkpoint, tmp_path), passages(model, 30, 25)
    merge(merged.module, bundle)
    base = read(model, given, 100)
    versions.route(placement.parameters, [placement.slot] * 2)
    for ours, theirs in zip(read(model, given, 100), read(merged, given, 100), strict=True):
        assert_near(ours, theirs, 2 * NETWORK.of_logits(theirs, 30), checkpoint)
    versions.route(0, [0, 0])
    for ours, theirs in zip(read(model, given, 100), base, strict=True):
        np.testing.assert_array_equal(ours, theirs)


class WithoutMasks(Headed):
    """A classifier that reads its padding, as on a device whose masks are wrong."""

    def __init__(self, right: Headed) -> None:
        super().__init__("body", right.body)
        self._right = (right,)

    @property
    def body(self) -> Any:
        return lambda ids, types, lengths, mixed: self["body"](ids, types, None)

    def scores(self, states: mx.array, lengths: mx.array | None = None) -> mx.array:
        return self._right[0].scores(states, lengths)


@pytest.mark.parametrize("checkpoint", CLASSIFIERS)
def test_padding_that_is_read_is_found(checkpoint: str, tmp_path: Path) -> None:
    model = opened(checkpoint, tmp_path)
    assert padding_fault(model) is None
    fault = padding_fault(replace(model, module=WithoutMasks(model.module)))
    assert fault is not None and "from itself alone" in fault
