"""One padded forward of an encoder for passages of similar length, and what each of them gets of it."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from rollout_server.engine.model.encoders.encoder import EncoderModel
from rollout_server.engine.model.encoders.passages import Passage, groups, width_of
from rollout_server.errors import NonFiniteLogits

Values = NDArray[np.float32]
SELF_TEST_LENGTHS = (3, 40, 9)


def forward(model: EncoderModel, passages: Sequence[Passage], *, mixed: bool = False) -> mx.array:
    """Label scores float32 [B, labels], those of tokens [B, N, labels], or vectors [B, width], lazily. `mixed`: adapter
    layers are routed to several versions, row by row. Passages have been checked by `Limits.check`."""
    lengths = [len(passage.ids) for passage in passages]
    # Rows of one length need no mask, and no padding.
    width = lengths[0] if len(set(lengths)) == 1 else min(width_of(max(lengths)), model.limits.max_tokens)
    ids = np.full((len(passages), width), model.pad_id, np.int32)
    types = np.zeros((len(passages), width), np.int32)
    for row, passage in enumerate(passages):
        ids[row, : lengths[row]] = passage.ids
        types[row, : len(passage.types)] = passage.types
    counts = None if width == min(lengths) else mx.array(lengths, mx.int32)
    states = model.body(mx.array(ids), mx.array(types) if types.any() else None, counts, mixed=mixed)
    return model.pooling.of(states, counts) if model.task == "embed" else model.module.scores(states, counts)


def results(model: EncoderModel, computed: mx.array, passages: Sequence[Passage]) -> list[Values | NonFiniteLogits]:
    """Each passage's [labels], [tokens, labels], or vector; a fault where that is no finite number, which is told
    to its owner and to nobody else's. Waits for the device."""
    values = np.array(computed, np.float32)
    found: list[Values | NonFiniteLogits] = []
    for row, passage in zip(values, passages, strict=True):
        own = row[: len(passage.ids)] if model.task == "token_classify" else row
        finite = np.isfinite(own).all()
        found.append(own if finite else NonFiniteLogits("The model gave NaN or infinity for a sequence."))
    return found


def read(model: EncoderModel, passages: Sequence[Passage], budget: int) -> list[Values]:
    """All passages, in their order, in forwards of at most `budget` cells each where a passage fits one at all. Raises
    `NonFiniteLogits` where one has no finite result."""
    found: dict[int, Values] = {}
    for group in groups([len(passage.ids) for passage in passages], budget):
        chosen = [passages[index] for index in group]
        for index, result in zip(group, results(model, forward(model, chosen), chosen), strict=True):
            if isinstance(result, NonFiniteLogits):
                raise result
            found[index] = result
    return [found[index] for index in range(len(passages))]


def padding_fault(model: EncoderModel) -> str | None:
    """What is wrong where sequences of three lengths in one forward are not what each is alone: half a sentence, or
    None. Masks are what devices have computed wrongly before."""
    lengths = [min(length, model.limits.max_tokens) for length in SELF_TEST_LENGTHS]
    vocabulary = model.limits.vocabulary
    given = [Passage(tuple((7 * i + 3 * length) % vocabulary for i in range(length))) for length in lengths]
    together = results(model, forward(model, given), given)
    for index, (passage, found) in enumerate(zip(given, together, strict=True)):
        (alone,) = results(model, forward(model, [passage]), [passage])
        if isinstance(found, NonFiniteLogits) or isinstance(alone, NonFiniteLogits):
            return f"row {index} of three gives NaN or infinity"
        gap, scale = float(np.abs(found - alone).max()), max(1.0, float(np.abs(alone).max()))
        # float32 hardly depends on the batch's shape; the half precisions visibly do.
        if gap > (1e-4 if model.dtype == mx.float32 else 0.05) * scale:
            return f"row {index} of three differs by {gap:.2g} from itself alone"
    return None
