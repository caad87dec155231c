"""The engine of an encoder, one turn at a time: answers, versions, pauses, and what fails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save

from adapters.bundle import AdapterBundle
from adapters.errors import AdapterDoesNotFit
from adapters.formats.read import read_bundle
from rollout_server.engine.messages.control import Abort, Pause, Paused, Ping, Pong, Release, Released, Resume, Stop
from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.messages.rollouts import RequestFailed
from rollout_server.engine.messages.scoring import Classified, Embedded, HoldScorer, LetScorerGo, ScorerHeld
from rollout_server.engine.messages.versions import Delete, Deleted
from rollout_server.engine.model.encoders.passages import Passage
from rollout_server.engine.model.encoders.reading import read
from rollout_server.engine.model.encoders.resident import ResidentEncoder, load_encoder
from rollout_server.engine.scheduling.idle_memory import IDLE_S
from rollout_server.errors import EngineFault, EngineUnavailable
from rollout_server.rollout import BASE, PolicyAddress
from tests.laws.grids import some_long
from tests.support.adapter_files import merge
from tests.support.engine.encoder_driver import Driven, classify, embed, numbers
from tests.support.golden_encoders import copied, opened
from tests.support.numbers.bounds import Network, assert_near
from tests.support.tiny_models import random_adapter

NETWORK = Network(3, 24, 3)
CHECKPOINTS = ["bert/classify", "roberta/classify", "deberta-v3/classify"]
SEQUENCES = ((5, 6, 7, 8, 9), tuple(range(10, 50)), (4,), (9, 8, 7, 6, 5))


def opened_engine(place: Path, checkpoint: str = "bert/classify", **options: Any) -> Driven:
    return Driven(load_encoder(EngineOptions(str(copied(checkpoint, place)), "tiny", **options)))


def adapter(encoder: ResidentEncoder, seed: int, head: bool = False, **config: Any) -> AdapterBundle:
    """As PEFT saves one; with `head` the classifier that was trained beside it."""
    info = encoder.info
    linear = {path: shape for path, shape in info.layers.items() if "embed" not in path}
    linear = {path: shape for path, shape in linear.items() if not (head and path == "classifier")}
    tensors, said = random_adapter(linear, 3, seed)
    if head:
        generator = np.random.default_rng(seed)
        for name in ("classifier.weight", "classifier.bias"):
            value = generator.normal(size=info.weights[name].shape).astype(np.float32)
            tensors[f"base_model.model.{name}"] = value
        said |= {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
    return read_bundle(save(tensors), said | config, layers=info.layers, parameters=info.weights, scoring=info.scoring)


def test_every_sequence_gets_what_it_gets_by_itself(tmp_path: Path) -> None:
    driven = opened_engine(tmp_path, prefill_tokens=50)
    model = driven.encoder.model
    (event,) = driven.ask(classify("a", SEQUENCES))
    for found, tokens in zip(numbers(event, 3), SEQUENCES, strict=True):
        (alone,) = read(model, [Passage(tokens)], 1000)
        assert_near(found[0], alone, NETWORK.of_logits(alone, 40))
    assert isinstance(event, Classified) and event.activation == "softmax" and event.version.number == 0
    assert driven.status.steps == 2 and driven.status.waiting == 0


def test_tokens_are_scored_where_they_were_asked_for(tmp_path: Path) -> None:
    driven = opened_engine(tmp_path, "modernbert/token_classify")
    (event,) = driven.ask(classify("a", SEQUENCES[:2], positions=((0, 3), (39,))))
    for found, tokens, places in zip(numbers(event, 3), SEQUENCES, ([0, 3], [39]), strict=False):
        (alone,) = read(driven.encoder.model, [Passage(tokens)], 1000)
        assert_near(found, alone[places], NETWORK.of_logits(alone, 40))


def test_types_tell_the_texts_of_a_pair_apart(tmp_path: Path) -> None:
    driven = opened_engine(tmp_path)
    tokens, types = (5, 6, 7, 8), (0, 0, 1, 1)
    (typed,) = driven.ask(classify("a", [tokens, tokens], types=(types, ())))
    paired, plain = numbers(typed, 3)
    (alone,) = read(driven.encoder.model, [Passage(tokens, types)], 100)
    assert_near(paired[0], alone, NETWORK.of_logits(alone, 4))
    assert np.abs(paired - plain).max() > 0.01


def test_vectors_come_as_long_as_they_are(tmp_path: Path) -> None:
    driven = opened_engine(tmp_path, "distilbert/embed")
    (event,) = driven.ask(embed("a", *SEQUENCES))
    assert isinstance(event, Embedded) and driven.encoder.info.embedding.normalise
    for vector, tokens in zip(event.vectors, SEQUENCES, strict=True):
        (alone,) = read(driven.encoder.model, [Passage(tokens)], 1000)
        assert_near(np.frombuffer(vector, "<f4"), alone, NETWORK.of_logits(alone, 40))
        assert abs(np.linalg.norm(alone) - 1) > 0.01, "who asks brings it to length 1"


def test_requests_share_forwards(tmp_path: Path) -> None:
    driven = opened_engine(tmp_path)
    events = driven.ask(*(classify(str(at), [tuple(range(at + 4, at + 10))]) for at in range(8)))
    assert [event.id for event in events] == [str(at) for at in range(8)] and driven.status.steps == 1


@pytest.mark.parametrize("checkpoint", some_long(CHECKPOINTS, "deberta-v3/classify"))
def test_versions_and_the_base_share_a_forward(checkpoint: str, tmp_path: Path) -> None:
    driven = opened_engine(tmp_path / "own", checkpoint)
    bundles = {name: adapter(driven.encoder, seed) for seed, name in enumerate(("one", "two"), 1)}
    merged = {name: opened(checkpoint, tmp_path / name) for name in (*bundles, BASE)}
    for name, bundle in bundles.items():
        driven.push(name, bundle)
        merge(merged[name].module, bundle)
    steps = driven.status.steps
    events = driven.ask(*(classify(name, SEQUENCES[:1], name) for name in merged))
    assert driven.status.steps == steps + 1
    for event in events:
        (alone,) = read(merged[event.id], [Passage(SEQUENCES[0])], 1000)
        assert_near(numbers(event, 3)[0][0], alone, 2 * NETWORK.of_logits(alone, 40), event.id)


def test_a_version_may_bring_its_own_classifier(tmp_path: Path) -> None:
    """PEFT trains one beside every adapter for SEQ_CLS."""
    driven = opened_engine(tmp_path / "own")
    bundle = adapter(driven.encoder, 1, head=True)
    driven.push("rm", bundle)
    theirs = merge(opened("bert/classify", tmp_path / "merged").module, bundle)
    names = ("classifier.weight", "classifier.bias")
    theirs.load_weights([(name, mx.array(bundle.tensors[name].float32())) for name in names], strict=False)
    own, base = driven.ask(classify("own", SEQUENCES[:1], "rm"), classify("base", SEQUENCES[:1]))
    model = replace(driven.encoder.model, module=theirs)
    (alone,) = read(model, [Passage(SEQUENCES[0])], 1000)
    assert_near(numbers(own, 3)[0][0], alone, 2 * NETWORK.of_logits(alone, 40))
    assert np.abs(numbers(own, 3)[0] - numbers(base, 3)[0]).max() > 0.01
    (gone,) = driven.ask(Delete("gone", "rm"))
    assert isinstance(gone, Deleted) and driven.status.sets == 0


def test_a_version_that_is_held_scores_whatever_its_name_means_later(tmp_path: Path) -> None:
    driven = Driven(load_encoder(EngineOptions(str(copied("bert/classify", tmp_path)), "tiny")), keep_versions=1)
    driven.push("rm", adapter(driven.encoder, 1))
    (before,) = driven.ask(classify("before", SEQUENCES, "rm"))
    (held,) = driven.ask(HoldScorer("held", "rows", PolicyAddress("rm")))
    assert isinstance(held, ScorerHeld) and (held.version.number, len(held.labels)) == (1, 3)
    driven.push("rm", adapter(driven.encoder, 2))
    (kept,) = driven.ask(classify("kept", SEQUENCES, "rm", held="held"))
    for one, other in zip(numbers(kept, 3), numbers(before, 3), strict=True):
        assert np.array_equal(one, other)
    assert [version.version.number for version in driven.status.policies[0].versions] == [1, 2]
    driven.ask(Pause("pause", "wait", drain=True))
    assert not any(isinstance(event, Paused) for event in driven.events), "rows of the call may still be scored"
    (late,) = driven.ask(classify("late", SEQUENCES[:1], "rm", held="held"))
    assert isinstance(late, Classified) and late.version.number == 1, "that is no new work"
    told = driven.ask(LetScorerGo("held"), LetScorerGo("unknown"))
    assert [type(event) for event in told] == [Paused]
    driven.ask(Resume("resume"))
    assert [version.version.number for version in driven.status.policies[0].versions] == [2]
    (gone,) = driven.ask(classify("gone", SEQUENCES, "rm", held="held"))
    assert isinstance(gone, RequestFailed) and isinstance(gone.error, EngineUnavailable)


def test_what_ends_a_call_ends_the_reading_for_its_rows(tmp_path: Path) -> None:
    driven = opened_engine(tmp_path)
    driven.ask(HoldScorer("held", "rows", PolicyAddress(BASE)))
    told = driven.ask(classify("a", SEQUENCES, held="held"), classify("b", SEQUENCES), Abort(("rows",)))
    assert {event.id: type(event) for event in told} == {"a": RequestFailed, "b": Classified}


def test_an_adapter_for_another_task_is_refused_by_name(tmp_path: Path) -> None:
    driven = opened_engine(tmp_path, "bert/token_classify")
    with pytest.raises(AdapterDoesNotFit, match="SEQ_CLS"):
        adapter(driven.encoder, 1, head=True)


def test_an_unknown_policy_is_told_so(tmp_path: Path) -> None:
    (event,) = opened_engine(tmp_path).ask(classify("a", SEQUENCES, "nobody"))
    assert isinstance(event, RequestFailed) and event.error.code == "unknown_policy"


def test_what_is_aborted_is_answered_once_and_read_no_further(tmp_path: Path) -> None:
    driven = opened_engine(tmp_path, prefill_tokens=40)
    for command in (classify("a", SEQUENCES[1:2] * 5), classify("b", SEQUENCES[:1])):
        driven.mailbox.put(command)
    driven.engine.turn()
    events = driven.ask(Abort(("a",), "disconnect"))
    assert isinstance(events[0], RequestFailed) and isinstance(events[0].error, EngineUnavailable)
    assert [event.id for event in events] == ["a", "b"] and driven.status.steps == 2


def test_a_pause_holds_what_comes_and_freezes_what_is_there(tmp_path: Path) -> None:
    driven = opened_engine(tmp_path, prefill_tokens=40)
    driven.mailbox.put(classify("a", SEQUENCES[1:2] * 3))
    driven.engine.turn()
    assert driven.ask(Pause("keep", "keep")) == [Paused("keep", "keep")]
    assert driven.ask(classify("b", SEQUENCES[:1])) == [] and driven.ask(Ping("p")) == [Pong("p")]
    assert driven.status.steps == 1
    events = driven.ask(Resume("on"))
    # One of three forwards of "a" had been read: it is the other's turn.
    assert [event.id for event in events if isinstance(event, Classified)] == ["b", "a"]
    driven.mailbox.put(classify("c", SEQUENCES[1:2] * 3))
    driven.engine.turn()
    ended, paused = driven.ask(Pause("abort", "abort"))
    assert isinstance(ended, RequestFailed) and isinstance(paused, Paused)


class OnFire:
    """A module whose device has a bad day with short sequences."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __call__(self, ids: Any, *rest: Any, **more: Any) -> Any:
        if ids.shape[1] < 9:
            raise RuntimeError("the device is on fire")
        return self._module(ids, *rest, **more)


def failing(place: Path, device: str | None = None) -> Driven:
    encoder = load_encoder(EngineOptions(str(copied("bert/embed", place)), "tiny"))
    return Driven(encoder, device, OnFire(encoder.module))


def test_a_forward_that_fails_takes_down_its_own_requests_alone(tmp_path: Path) -> None:
    driven = failing(tmp_path)
    events = driven.ask(embed("bad", (4,), SEQUENCES[1]), embed("good", SEQUENCES[1]))
    told = {event.id: event for event in events}
    assert isinstance(told["good"], Embedded) and len(events) == 2
    bad = told["bad"]
    assert isinstance(bad, RequestFailed) and isinstance(bad.error, EngineFault) and "on fire" in bad.error.message
    assert driven.status.state == "ready"


def test_a_device_that_is_gone_ends_the_engine(tmp_path: Path) -> None:
    driven = failing(tmp_path, "it burnt down")
    with pytest.raises(EngineUnavailable, match="it burnt down") as raised:
        driven.ask(embed("bad", (4,)))
    driven.engine.die(raised.value)
    (event,) = driven.events
    assert isinstance(event, RequestFailed) and driven.status.state == "dead"


def test_stopping_answers_whatever_is_open(tmp_path: Path) -> None:
    driven = opened_engine(tmp_path)
    driven.ask(Pause("keep", "keep"))
    for command in (classify("a", SEQUENCES), Stop()):
        driven.mailbox.put(command)
    driven.engine.run()
    driven.engine.stop()
    last = driven.events[-1]
    assert isinstance(last, RequestFailed) and last.id == "a" and driven.status.state == "stopping"


def test_memory_is_given_back(tmp_path: Path) -> None:
    driven = opened_engine(tmp_path)
    driven.ask(classify("a", SEQUENCES))
    (event,) = driven.ask(Release("r"))
    assert isinstance(event, Released) and event.nbytes > 0 and event.kv_bytes == 0
    assert driven.status.memory.weights == driven.encoder.info.weight_bytes > 0


def test_an_engine_at_rest_keeps_nothing_of_freed_arrays(tmp_path: Path) -> None:
    driven = opened_engine(tmp_path)
    driven.ask(classify("a", SEQUENCES))
    assert mx.get_cache_memory() > 0
    driven.ask(Ping("soon"))
    assert mx.get_cache_memory() > 0
    driven.now += IDLE_S
    driven.ask(Ping("later"))
    assert mx.get_cache_memory() == 0


def test_options_of_keys_and_values_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailable, match="--kv-bits"):
        opened_engine(tmp_path, kv_bits=8)
