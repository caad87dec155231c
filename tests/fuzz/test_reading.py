"""Whatever is sent as an adapter is either a version that can be served or a 4xx with a sentence."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import given, settings
from mlx_lm.utils import load_model

from adapters.errors import AdapterError
from adapters.formats.read import read_bundle
from adapters.prepare import PreparedBundle, prepare
from adapters.report import report
from adapters.resident.model_layers import adaptable_layers
from adapters.resident.slots import AdapterSlots
from rollout_server.adapter_errors import from_adapters
from rollout_server.errors import RolloutError
from rollout_server.http.problems import body_of, row_of
from rollout_server.http.requests.uploads import config_of
from tests.fuzz.uploads import Upload, uploads, valid_uploads
from tests.laws.grids import some_long
from tests.support import tiny_models

SECONDS = 5.0
"""Of this thread's processor time for one file; expressions alone may have one."""
MEGABYTES = 200
"""By which one file of a few kilobytes may raise the most memory the process ever had."""
TOKENS = mx.array([[1, 2, 3]])


@dataclass
class Base:
    model: nn.Module
    dtype: str
    layers: dict[str, tuple[int, int]]
    slots: AdapterSlots
    logits: mx.array


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    """One plain, one of 4 bits in bfloat16; both small, so that files are."""
    path = tiny_models.build(
        "qwen3", tmp_path_factory.mktemp("fuzz") / "qwen3", num_hidden_layers=2, hidden_size=32, intermediate_size=64
    )
    found = {}
    for name, dtype in (("plain", mx.float32), ("quantised", mx.bfloat16)):
        model, _ = load_model(path)
        model.set_dtype(dtype)
        if name == "quantised":
            nn.quantize(model, group_size=32, bits=4)
        layers = adaptable_layers(model)
        found[name] = Base(
            model, str(dtype).removeprefix("mlx.core."), layers, AdapterSlots(model, layers, dtype), model(TOKENS)
        )
    return found


def read(base: Base, upload: Upload, in_metadata: bool) -> PreparedBundle:
    """As `POST /v1/weights` does."""
    config = None if in_metadata else config_of(upload.config_bytes)
    bundle = read_bundle(upload.file(with_config=in_metadata), config, layers=base.layers)
    prepared = prepare(bundle, base.dtype)
    json.dumps(asdict(report(bundle)), allow_nan=False)
    return prepared


def check_refusal(error: AdapterError | RolloutError) -> None:
    said = from_adapters(error) if isinstance(error, AdapterError) else error
    assert 400 <= row_of(said).status < 500
    message = body_of(said)["error"]["message"]
    assert message.strip() == message and message[-1] in ".!?…" and message[0] not in ".,:", message
    assert message.isprintable(), message
    assert len(message.encode()) < 1_000_000


def most_memory() -> int:
    """Megabytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most // 2**20 if sys.platform == "darwin" else most // 2**10


@pytest.mark.filterwarnings("ignore:Possible:FutureWarning")  # Of Python's `re`, of some expressions.
@pytest.mark.parametrize("times", some_long([2, 17], 2))
def test_a_mutated_upload_is_served_or_refused_with_a_sentence(bases: dict[str, Base], times: int) -> None:
    valid = valid_uploads({name: base.layers for name, base in bases.items()})
    outcomes: Counter[str] = Counter()

    @settings(max_examples=times * settings().max_examples)
    @given(uploads(valid))
    def one(case: tuple[str, Upload, bool]) -> None:
        name, upload, in_metadata = case
        began, before = time.thread_time(), most_memory()
        outcomes[outcome(bases[name], upload, in_metadata)] += 1
        assert time.thread_time() - began < SECONDS
        assert most_memory() - before < MEGABYTES
        assert bases[name].slots.slots_in_use == 0

    one()
    assert outcomes.total() >= 94 * times
    wanted = {"served", "AdapterUnreadable", "AdapterUnsupported", "AdapterDoesNotFit", "BadBody", "InvalidField"}
    assert wanted <= outcomes.keys() and min(outcomes[name] for name in wanted) >= times // 3, outcomes
    for base in bases.values():
        base.slots.route([0])
        assert mx.array_equal(base.model(TOKENS), base.logits).item(), "the base is what it was"


def outcome(base: Base, upload: Upload, in_metadata: bool) -> str:
    """Name of the error, or `served` for a version that the model then computes with."""
    try:
        prepared = read(base, upload, in_metadata)
        base.slots.stage(prepared)
    except (AdapterError, RolloutError) as error:
        check_refusal(error)
        return type(error).__name__
    digest = prepared.bundle.digest
    base.slots.route([base.slots.slot(digest)])
    mx.eval(base.model(TOKENS))
    base.slots.release(digest)
    return "served"
