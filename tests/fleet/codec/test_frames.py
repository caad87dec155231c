"""Every message comes out of its frame as it went in, and what is no message is refused by name."""

from __future__ import annotations

import io
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import pytest

from adapters.bundle import AdapterBundle, make_bundle
from adapters.prepare import prepare
from adapters.spec import AdapterSpec, EmbeddingShape, ExpertsShape, ModuleSpec, Parameter, TiedHeadShape, place_of
from adapters.tensors import AdapterTensor
from rollout_server import errors
from rollout_server.engine.messages import control, options, rollouts, scoring, status, versions
from rollout_server.errors import RolloutError
from rollout_server.fleet.codec.frames import LENGTHS, BadFrame, Codec, next_frame
from rollout_server.fleet.codec.values import Described, described, model_info
from rollout_server.fleet.wire import StageVersion, link_codec
from rollout_server.grammar import Grammar, GrammarKind
from rollout_server.http.problems import subclasses
from rollout_server.rollout import (
    FinishReason,
    GivenSpan,
    OnUpdate,
    PolicyAddress,
    PolicyVersion,
    Prefix,
    Rollout,
    RolloutRequest,
    RowError,
    RowReward,
    SamplingParams,
    Span,
    SpanAddress,
    Timings,
    Wants,
)
from rollout_server.text.pictures.picture import Picture

KINDS = (*get_args(rollouts.Command), *get_args(rollouts.Event))
ALSO = (status.EngineStatus, options.EngineOptions, Described)


class Compiled:
    """What a process makes of a grammar; equal where the grammar is."""

    def __init__(self, grammar: Grammar) -> None:
        self.grammar = grammar

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Compiled) and other.grammar == self.grammar

    def __hash__(self) -> int:
        return hash(self.grammar)

    def follow(self, token_ids: object) -> Any:
        raise AssertionError("Nothing follows it on its way.")

    def accepted(self, token_ids: object) -> int:
        raise AssertionError("Nothing is asked of it on its way.")


CODEC = Codec((*KINDS, *ALSO), Compiled)
VERSION = PolicyVersion("trained", 7, "sha256:" + "ab" * 32, "step-7")
ADDRESS = PolicyAddress("trained", 7)
GRAMMAR = Compiled(Grammar(GrammarKind.REGEX, "a+é", after=(3, 4)))
SAMPLING = SamplingParams(max_tokens=9, temperature=0.7, stop=("né",), logit_bias=((5, -1.5),), constraint=GRAMMAR)
PREFIX = Prefix(
    (4, 5),
    (-0.5, math.inf),
    (-0.25, 0.0),
    (1, 0),
    (GivenSpan(None, None, None, None, 0, 1), GivenSpan("p", 1, "d", "l", 1, 2)),
)
PICTURE = Picture("sha256:" + "cd" * 32, np.arange(24, dtype="<f4").tobytes(), (1, 24), (1, 2, 2), 1)
GROUP = RolloutRequest(
    "r",
    (1, 2, 3),
    SAMPLING,
    PolicyAddress("trained", digest="sha256:abcdef01"),
    n=2,
    prompt_index=3,
    seeds=(2**53 - 1, 0),
    min_version=2,
    wait_s=1.5,
    on_update=OnUpdate.SWITCH,
    max_staleness=1,
    wants=Wants(entropy=True, top_logprobs=2),
    prefix=PREFIX,
    return_when=1,
    shown=frozenset({7, 8}),
)
ROLLOUT = Rollout(
    3,
    1,
    (1, 2, 3),
    (4, 5, 6),
    (-0.1, -0.2, float(np.float32(-0.3))),
    (-0.1, -0.2, 0.0),
    (0.0, 0.0, -1e-9),
    (Span(VERSION, 0, 1, "carried"),),
    FinishReason.ABORTED,
    "timeout",
    12,
    SAMPLING,
    Timings(1.0, 2.0, 3.5),
    top_logprobs=(None, ((1, -0.5), (2, -1.5)), ()),
    prompt_logprobs=(None, -2.0),
    error=RowError("engine_fault", "It broke."),
    prefix=PREFIX,
    reward=RowReward((0.5,), VERSION),
)
DRAWN = (SpanAddress(ADDRESS, 0, 2, "d", "recomputed"),)
RECORDED = scoring.RecordedRow((1,), (2, 3), DRAWN, (True, False), (-1.0, None), SAMPLING, 5)
SCORED = scoring.ScoredSequence((None, -1.0), (0.5,), (None, ((1, -1.0),)), (Span(VERSION, 0, 1),))
STATUS = versions.VersionStatus(VERSION, "lora", "adapter", 8, 2, True, False, 3, 4096, 1.7e9, 99, "classify", 2)


def bundle(seed: int = 0, width: int = 6) -> AdapterBundle:
    values = np.random.default_rng(seed)
    tensors = {
        "layer.lora_A": AdapterTensor("F32", values.standard_normal((2, width), np.float32)),
        "layer.lora_B": AdapterTensor("BF16", values.integers(0, 15000, (4, 2)).astype("<u2")),
        "layer.lora_magnitude_vector": AdapterTensor("F16", values.standard_normal(4).astype("<f2")),
    }
    return make_bundle(AdapterSpec("dora", {"layer": ModuleSpec(2, 0.5)}), tensors)


EXAMPLES: tuple[Any, ...] = (
    rollouts.Submit("r", (GROUP, replace(GROUP, sampling=SamplingParams(max_tokens=4))), 12.5),
    rollouts.Submit("again", (GROUP,), 12.5, 7),
    rollouts.Submit("v", (replace(GROUP, pictures=(PICTURE,)),), None),
    scoring.Score("s", ADDRESS, ((1, 2), ()), (1, 0), 0.5, True, 3, ((SpanAddress(ADDRESS, 0, 1),), None), True),
    scoring.Replay("y", (RECORDED, replace(RECORDED, pictures=(PICTURE,)))),
    scoring.Embed("e", ADDRESS, ((1, 2),), ((PICTURE,),)),
    scoring.Classify("c", ADDRESS, ((1,),), ((0,),), (4,), ((0,),), "/hold/1"),
    scoring.HoldScorer("h", "r", ADDRESS, True),
    scoring.LetScorerGo("h"),
    versions.Activate("a", "trained", 7, "sha256:abcdef01", True),
    versions.Pin("p", "trained", 7, True),
    versions.Delete("d", "trained", None),
    versions.Export("x", "trained", 7),
    control.Abort(("r", "q"), "disconnect"),
    control.Pause("w", "keep", True),
    control.Resume("w"),
    control.Release("m"),
    control.ResetPrefixCache("k"),
    control.Ping("i"),
    control.LookAtRows("z"),
    control.Leave("l", "local-1", True),
    control.Stop(),
    rollouts.TokensSampled("r", 0, 1, VERSION, (5,), (-0.5,), (-0.25,), (((5, -0.5), (6, -1.0)),)),
    rollouts.RowFinished("r", ROLLOUT),
    rollouts.Admitted("r", 3, VERSION),
    rollouts.AwaitsVersion("r", 3),
    rollouts.RequestDone("r"),
    scoring.Scored("s", VERSION, 0.5, (SCORED,)),
    scoring.Replayed("y", (scoring.ReplayedRow(None, 0.25, None),)),
    scoring.Embedded("e", VERSION, (b"\x00\x01\xff\x00",)),
    scoring.Classified("c", VERSION, (b"\x00\x00\x80?",), ("good", None), "sigmoid"),
    scoring.ScorerHeld("h", VERSION, ("good", None)),
    versions.Published("u", VERSION, True, False, 1.5, 0.5, "merged", 77, 3.0, {"layer": 0.25}),
    versions.Pinned("p", STATUS),
    versions.Deleted("d", "trained", 9, (7, 8), 2),
    versions.Restored("o", "trained"),
    control.Paused("w", None),
    control.Released("m", 100, 50),
    control.PrefixCacheReset("k", 64),
    control.Pong("i"),
    control.RowsSeen("z", (control.RowSeen("r", 0, 1, VERSION, 5, 16, False),), 2, ((VERSION, 2),)),
    control.Leaving("l", "local-1"),
    status.EngineStatus("ready", policies=(versions.PolicyStatus("trained", VERSION, (STATUS,), 9, ("sha256:00",)),)),
    options.EngineOptions("/models/tiny", "tiny", kv_memory=2**33, keep_versions=None, tell_admissions=True),
)  # fmt: skip
BY_THEMSELVES = {versions.Publish, versions.Restore, versions.Exported, rollouts.RequestFailed, Described}
"""Messages that hold arrays or errors, which are compared in tests of their own."""


def round_trip(message: Any) -> Any:
    frame = io.BytesIO(CODEC.encode(message))
    assert sum(LENGTHS.unpack_from(frame.getbuffer())) == frame.getbuffer().nbytes - LENGTHS.size
    found, behind = next_frame(frame.readinto), next_frame(frame.readinto)
    assert found is not None and behind is None
    return CODEC.decode(*found)


def same_bundle(left: AdapterBundle, right: AdapterBundle) -> bool:
    arrays = all(
        left.tensors[name].dtype == right.tensors[name].dtype
        and left.tensors[name].array.tobytes() == right.tensors[name].array.tobytes()
        and left.tensors[name].array.shape == right.tensors[name].array.shape
        for name in left.tensors.keys() | right.tensors.keys()
    )
    return arrays and (left.spec, left.digest, dict(left.measures)) == (right.spec, right.digest, dict(right.measures))


def test_there_is_an_example_of_every_message() -> None:
    assert {type(example) for example in EXAMPLES} | BY_THEMSELVES == {*KINDS, *ALSO}


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_comes_out_as_it_went_in(message: Any) -> None:
    assert round_trip(message) == message


def test_not_a_number_and_minus_zero_keep_their_bits() -> None:
    sent = rollouts.TokensSampled("r", 0, 0, VERSION, (1,), (math.nan,), (-0.0,))
    (logprob,), (sampling,) = (got := round_trip(sent)).logprobs, got.sampling_logprobs
    assert math.isnan(logprob) and math.copysign(1.0, sampling) == -1.0


@pytest.mark.parametrize("prepared", [False, True])
def test_a_bundle_arrives_whole_and_its_digest_is_that_of_its_bytes(prepared: bool) -> None:
    own = bundle()
    ready = prepare(own, "bfloat16") if prepared else None
    sent = versions.Publish("u", "trained", own, label="x", prepared=ready, number=7, before=(("receive", 0.0, 1.0),))
    got = round_trip(sent)
    assert same_bundle(got.bundle, own) and make_bundle(got.bundle.spec, got.bundle.tensors).digest == own.digest
    assert not any(tensor.array.flags.writeable for tensor in got.bundle.tensors.values())
    assert replace(got, bundle=own, prepared=ready) == sent
    if ready is not None:
        assert got.prepared.factors["layer"].a.tobytes() == ready.factors["layer"].a.tobytes()
        assert got.prepared.deltas["layer"].squared.tobytes() == ready.deltas["layer"].squared.tobytes()


def test_restored_and_exported_versions_arrive_whole() -> None:
    kept = versions.RestoredVersion(7, bundle(), "x", 1.5, True, False)
    got = round_trip(versions.Restore("o", "trained", 9, (kept,), ("sha256:00",)))
    assert same_bundle(got.versions[0].bundle, kept.bundle)
    assert replace(got.versions[0], bundle=kept.bundle) == kept and (got.last, got.gone) == (9, ("sha256:00",))
    assert same_bundle(round_trip(versions.Exported("x", VERSION, bundle(1))).bundle, bundle(1))


@pytest.mark.parametrize("cls", [RolloutError, *subclasses()], ids=lambda cls: cls.__name__)
def test_every_error_arrives_as_the_same_error(cls: type[RolloutError]) -> None:
    more: dict[str, Any] = {
        errors.AdapterMismatch: {"faults": ("one", "two")},
        errors.PreconditionFailed: {"at": ("trained", 7, "sha256:00")},
        errors.QueueFull: {"retry_after_s": 2.5},
    }.get(cls, {})
    error = cls("It was wrong.", param="n", **more)
    error.retryable = not cls.retryable
    got = round_trip(rollouts.RequestFailed("r", error)).error
    assert type(got) is cls and vars(got) == vars(error) and got.retryable == error.retryable


def test_a_model_keeps_what_its_layers_are() -> None:
    layers: dict[str, tuple[int, int]] = {
        "embed": EmbeddingShape(8, 100),
        "lm_head": TiedHeadShape(100, 8),
        "mlp.experts": ExpertsShape(16, 8, 4),
        "q_proj": (8, 8),
    }
    info = options.ModelInfo(
        "a", "sha256:00", "qwen3", 100, 64, "float32", {"bits": 4}, (1, 2), 1000, layers, 64, 2**20, "slots", 8, "cpu"
    )  # fmt: skip
    info = replace(info, weights={"norm.weight": Parameter((8,), "float32")}, unfit={"experts": "wrong"})
    got = model_info(round_trip(described(info)))
    assert got == info
    assert [(type(s), place_of(s), getattr(s, "experts", 0)) for s in got.layers.values()] == [
        (type(s), place_of(s), getattr(s, "experts", 0)) for s in layers.values()
    ]


@pytest.mark.parametrize(
    "body",
    [
        pickle.dumps(("Ping", {"id": "x"})),
        b"",
        b"\x93\x01\x02\x03",
        CODEC.encode(control.Ping("i"))[LENGTHS.size : -1],
        CODEC.encode(control.Ping("i"))[LENGTHS.size :].replace(b"Ping", b"Pang"),
        CODEC.encode(control.Ping("i"))[LENGTHS.size :].replace(b"id", b"ie"),
    ],
)
def test_what_is_no_message_is_refused(body: bytes) -> None:
    with pytest.raises(BadFrame):
        CODEC.decode(body)


STAGE = StageVersion("/stage/1/p", "p", 1, bundle(width=300_000), None, "adapter", dequantize=False)


def test_the_arrays_of_a_version_are_copied_neither_into_its_frame_nor_out_of_it() -> None:
    own = [tensor.array for tensor in STAGE.bundle.tensors.values()]
    head, *sent = link_codec(Compiled).parts(STAGE)
    assert len(head) < 2000
    assert all(any(np.shares_memory(np.frombuffer(part, np.uint8), array) for part in sent) for array in own)
    arrays = np.frombuffer(b"".join(sent), np.uint8)
    got = link_codec(Compiled).decode(memoryview(head)[LENGTHS.size :], memoryview(arrays)).bundle
    assert same_bundle(got, STAGE.bundle)
    for tensor in got.tensors.values():
        assert (
            np.shares_memory(tensor.array, arrays) and tensor.array.flags.aligned and not tensor.array.flags.writeable
        )


@pytest.mark.parametrize("cut", [1, 16, 1000])
def test_a_frame_whose_arrays_are_not_all_there_is_refused(cut: int) -> None:
    head, *sent = link_codec(Compiled).parts(STAGE)
    with pytest.raises(BadFrame, match="could not be read"):
        link_codec(Compiled).decode(memoryview(head)[LENGTHS.size :], b"".join(sent)[:-cut])


@pytest.mark.parametrize(
    "told", [("|O", (1,), 0), ("<f4", (-1,), 0), ("<f4", ("a",), 0), ("<f4", (2**62,), 0), (1, 2, 3)]
)
def test_an_array_that_is_none_is_refused(told: tuple[Any, ...]) -> None:
    """What a stranger may say of one: Python objects, sizes that are none, and more than came."""
    frame = link_codec(Compiled).parts(replace(STAGE, bundle=bundle()))
    head = msgspec.msgpack.decode(bytes(frame[0])[LENGTHS.size :])
    head[1]["bundle"]["tensors"]["layer.lora_A"]["array"] = told
    with pytest.raises(BadFrame, match="could not be read"):
        link_codec(Compiled).decode(msgspec.msgpack.encode(head), b"".join(frame[1:]))


def test_a_stream_that_ends_within_a_frame_has_no_frame() -> None:
    frame = CODEC.encode(versions.Exported("x", VERSION, bundle(1)))
    for end in range(len(frame)):
        assert next_frame(io.BytesIO(frame[:end]).readinto) is None


def test_types_outside_the_protocol_do_not_leave() -> None:
    with pytest.raises(BadFrame, match="Path is no message"):
        CODEC.encode(Path("/etc/passwd"))
