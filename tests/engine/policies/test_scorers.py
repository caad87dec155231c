"""Reward versions: an adapter with a head of its own on the resident base, beside versions that sample.

What an adapter makes of hidden states is compared with PEFT elsewhere; here the head is put on them in float64, one
sequence at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from adapters.bundle import AdapterBundle
from adapters.errors import AdapterDoesNotFit
from adapters.formats import peft, whole_tensors
from adapters.formats.read import read_bundle
from adapters.versions.packed import pack, unpack
from rollout_server.engine.messages.scoring import Classified
from rollout_server.engine.messages.versions import Delete, Export, Pin, Restore, RestoredVersion
from rollout_server.errors import Conflict, InvalidField, VersionGone
from tests.laws.grids import corners
from tests.support import tiny_models, tiny_scorers
from tests.support.engine.driver import Driver, prompts_of
from tests.support.numbers.bounds import TINY, assert_near
from tests.support.tiny_scorers import reward_bundle

ROWS = prompts_of([30, 4, 90, 17], 200)


@pytest.fixture
def driver(tmp_path: Path) -> Driver:
    return Driver.start(tiny_models.build("llama", tmp_path), prefill_tokens=48)


def expected(driver: Driver, policy: str, head: dict[str, np.ndarray], rows: Sequence[Sequence[int]] = ROWS) -> Any:
    """[rows, labels]: the last hidden states under a version, each sequence alone, and a head in float64."""
    states = np.concatenate([driver.embed([row], policy) for row in rows]).astype(np.float64)
    return states @ head["score.weight"].T + head.get("score.bias", 0.0)


def hold(driver: Driver, policy: str, head: dict[str, np.ndarray], found: Sequence[np.ndarray] | None = None) -> None:
    scores = np.concatenate(found if found is not None else driver.classify(ROWS, policy))
    want = expected(driver, policy, head)
    assert_near(scores, want, TINY.of_logits(want, max(map(len, ROWS))))


def head_of(bundle: AdapterBundle) -> dict[str, np.ndarray]:
    return {name: bundle.tensors[name].float32() for name in bundle.spec.head}


@pytest.mark.parametrize(("mode", "dora"), corners(["adapter", "merged"], [False, True]))
def test_a_reward_version_of_a_base_that_generates(driver: Driver, dora: bool, mode: str) -> None:
    bundle = reward_bundle(driver.model.info, labels=3, dora=dora)
    assert (bundle.spec.task, bundle.spec.head, bundle.labels) == ("classify", ("score.weight",), 3)
    before = driver.score(ROWS)
    driver.push("rm", bundle, mode=mode)
    hold(driver, "rm", head_of(bundle))
    assert [row.logprobs for row in driver.score(ROWS)] == [row.logprobs for row in before], "the base is untouched"


def test_a_head_for_tokens_has_a_bias(driver: Driver) -> None:
    bundle = reward_bundle(driver.model.info, labels=2, task_type="TOKEN_CLS")
    assert (bundle.spec.task, bundle.spec.head) == ("token_classify", ("score.bias", "score.weight"))
    driver.push("prm", bundle)
    hold(driver, "prm", head_of(bundle))
    (every,) = driver.classify(ROWS[:1], "prm", positions=[range(30)])
    prefixes = [ROWS[0][: at + 1] for at in range(30)]
    want = expected(driver, "prm", head_of(bundle), prefixes)
    assert_near(every, want, TINY.of_logits(want, 30))


def test_versions_with_heads_share_forwards_with_others_and_with_rows_that_decode(driver: Driver) -> None:
    """One parameter set serves them all: nothing is read apart."""
    bundles = {name: reward_bundle(driver.model.info, seed, labels=2) for name, seed in (("a", 1), ("b", 2))}
    for name, bundle in bundles.items():
        driver.push(name, bundle)
    driver.push("policy", driver.bundle(7))
    alone = driver.generate([ROWS[1]], policy="policy", max_tokens=20)
    rows = driver.submit([ROWS[1]], policy="policy", max_tokens=20)
    driver.turn(3)
    asked = {name: driver.ask_classify(ROWS, name) for name in bundles}
    embedded = driver.ask_embed(ROWS, "a")
    found = {name: driver.classified(id) for name, id in asked.items()}
    driver.finish(rows)
    for name, bundle in bundles.items():
        hold(driver, name, head_of(bundle), found[name])
    assert driver.embedded(embedded).shape == (len(ROWS), tiny_scorers.HIDDEN)
    assert driver.rollouts(rows)[0].token_ids == alone[0].token_ids
    assert driver.policies.sets == ()


def test_names_move_and_versions_stay(driver: Driver) -> None:
    first, second = (reward_bundle(driver.model.info, seed) for seed in (1, 2))
    driver.push("rm", first)
    driver.push("rm", second)
    hold(driver, "rm", head_of(second))
    hold(driver, "rm@1", head_of(first))
    driver.activate("rm", 1)
    hold(driver, "rm", head_of(first))
    driver.change(Pin("", "rm", 2, True))
    assert driver.push("rm", first).unchanged
    driver.change(Pin("", "rm", 2, False))
    driver.change(Delete("", "rm", 2))
    with pytest.raises(VersionGone):
        driver.classify(ROWS, "rm@2")
    hold(driver, "rm", head_of(first))


def test_the_same_adapter_with_another_head_is_another_version(driver: Driver) -> None:
    heads = [tiny_scorers.random_head(1, seed=seed) for seed in (1, 2)]
    bundles = [reward_bundle(driver.model.info, head=head) for head in heads]
    assert bundles[0].digest != bundles[1].digest
    for bundle in bundles:
        assert not driver.push("rm", bundle).unchanged
    for number, head in enumerate(heads, 1):
        hold(driver, f"rm@{number}", head)


def test_what_scores_does_not_sample_and_what_samples_does_not_score(driver: Driver) -> None:
    driver.push("rm", reward_bundle(driver.model.info))
    driver.push("policy", driver.bundle(3))
    id = driver.submit([[1, 2, 3]], policy="rm")
    driver.finish(id)
    assert isinstance(driver.error(id), InvalidField)
    assert "rm@1 scores labels" in driver.error(id).message
    for refused in (
        lambda: driver.score([[1, 2]], policy="rm"),
        lambda: driver.classify([[1, 2]], "rm", label_token_ids=(3,)),
        lambda: driver.classify([[1, 2]], "policy"),
        lambda: driver.classify([[1, 2]], "base"),
    ):
        with pytest.raises(InvalidField, match=r"@\d (scores labels|generates)"):
            refused()
    driver.turn()
    assert not driver.busy
    (status,) = [policy for policy in driver.policies.snapshot() if policy.name == "rm"]
    assert (status.versions[0].task, status.versions[0].labels, status.versions[0].rows_in_use) == ("classify", 1, 0)


def test_a_name_keeps_its_purpose(driver: Driver) -> None:
    driver.push("rm", reward_bundle(driver.model.info))
    driver.push("policy", driver.bundle(3))
    with pytest.raises(Conflict, match="policy@1 is for the task generate"):
        driver.push("policy", reward_bundle(driver.model.info))
    with pytest.raises(Conflict, match="rm@1 is for the task classify"):
        driver.push("rm", driver.bundle(3))
    with pytest.raises(Conflict, match="token_classify"):
        driver.push("rm", reward_bundle(driver.model.info, task_type="TOKEN_CLS"))


def test_rows_that_would_follow_a_name_to_a_head_stay_where_they_are(driver: Driver) -> None:
    driver.push("policy", driver.bundle(3))
    whole = driver.generate([[1, 2, 3]], policy="policy", max_tokens=16, ignore_eos=True)
    id = driver.submit([[1, 2, 3]], policy="policy", max_tokens=16, on_update="switch", ignore_eos=True)
    driver.turn(4)
    driver.change(Delete("", "policy"))
    driver.push("policy", reward_bundle(driver.model.info))
    driver.finish(id)
    assert driver.rollouts(id)[0].token_ids == whole[0].token_ids
    assert {span.version.number for span in driver.rollouts(id)[0].spans} == {1}


def test_a_head_alone_is_a_version_too(driver: Driver) -> None:
    """A linear probe: whole tensors of the kind full, and none of the base's."""
    head = tiny_scorers.random_head(2)
    bundle = tiny_scorers.bundle(driver.model.info, head, {"kind": "full", "task_type": "SEQ_CLS"})
    assert (bundle.spec.dense, bundle.spec.head) == ((), ("score.weight",))
    driver.push("probe", bundle)
    hold(driver, "probe", head)
    assert driver.policies.sets == (), "it runs on the base's own parameters"
    body, config = whole_tensors.write(driver.change(Export("", "probe", 1)).bundle)
    again = read_bundle(body, config, layers=driver.model.info.layers, scoring=driver.model.info.scoring)
    assert (again.digest, again.spec) == (bundle.digest, bundle.spec)


def test_a_fully_trained_reward_model_is_a_version_of_its_base(tmp_path: Path) -> None:
    driver = Driver.start(tiny_scorers.build("llama", tmp_path / "one", labels=1))
    other = tiny_scorers.build("llama", tmp_path / "two", labels=1, head=tiny_scorers.random_head(1, seed=9))
    trained = {name: array * np.float32(1.01) for name, array in load_file(other / "model.safetensors").items()}
    driver.push("rm", tiny_scorers.bundle(driver.model.info, trained, {"kind": "full"}))
    hold(driver, "rm", {"score.weight": trained["score.weight"]})


@pytest.mark.parametrize("own", [True, False])
def test_adapters_on_a_resident_reward_model(own: bool, tmp_path: Path) -> None:
    """With a head it takes the place of the base's; without one the base's is read."""
    driver = Driver.start(tiny_scorers.build("llama", tmp_path, labels=1))
    base = load_file(tmp_path / "model.safetensors")
    if own:
        bundle = reward_bundle(driver.model.info, labels=2)
        head = head_of(bundle)
    else:
        tensors, config = tiny_models.random_adapter(driver.model.info.layers, 4, 1)
        config = {**config, "task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
        bundle = tiny_scorers.bundle(driver.model.info, tensors, config)
        head = {"score.weight": base["score.weight"]}
    driver.push("rm", bundle)
    hold(driver, "rm", head)
    hold(driver, "base", {"score.weight": base["score.weight"]})


@pytest.mark.parametrize(
    ("labels", "task_type", "names", "activation"),
    [
        (2, "SEQ_CLS", ("bad", "good"), "none"),
        (3, "SEQ_CLS", (None, None, None), "softmax"),
        (1, "SEQ_CLS", (None,), "sigmoid"),
        (2, "TOKEN_CLS", (None, None), "softmax"),
    ],
)
def test_a_head_that_scores_what_the_base_does_keeps_its_names(
    labels: int, task_type: str, names: tuple[str | None, ...], activation: str, tmp_path: Path
) -> None:
    """PEFT's files carry a trained head, and say nothing of its labels: those are the base's."""
    named = {"id2label": {"0": "bad", "1": "good"}, "problem_type": "regression"}
    driver = Driver.start(tiny_scorers.build("llama", tmp_path, labels=2, **named))
    driver.push("trained", reward_bundle(driver.model.info, labels=labels, task_type=task_type))
    id = driver.ask_classify(ROWS[:1], "trained")
    driver.classified(id)
    (found,) = (event for event in driver.events if isinstance(event, Classified) and event.id == id)
    assert (found.labels, found.activation) == (names, activation)


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"task_type": "TOKEN_CLS", "labels": 2}], ids=str)
def test_what_is_written_for_peft_or_for_the_disk_reads_back(driver: Driver, options: dict[str, Any]) -> None:
    info = driver.model.info
    bundle = reward_bundle(info, **options)
    body, config = peft.write(bundle)
    assert config["modules_to_save"] == ["classifier", "score"]
    again = read_bundle(body, config, layers=info.layers, parameters=info.weights, scoring=info.scoring)
    kept = unpack(pack(bundle))
    for other in (again, kept):
        assert (other.digest, other.spec.head, other.spec.task) == (bundle.digest, bundle.spec.head, bundle.spec.task)
    driver.push("rm", bundle)
    version = RestoredVersion(3, kept, "step-3", 1.0, True, False)
    driver.change(Restore("", "old", 3, (version,)))
    hold(driver, "old@3", head_of(bundle))


@pytest.mark.long
def test_a_thousand_pushes_of_both_kinds_leave_nothing_behind(driver: Driver) -> None:
    info = driver.model.info
    targets = ["q_proj"]
    rewards = [reward_bundle(info, seed, targets=targets) for seed in range(3)]
    samplers = [driver.bundle(seed, targets=targets) for seed in range(3)]
    for turn in range(500):
        driver.push("rm", rewards[turn % 3])
        driver.push("policy", samplers[turn % 3])
    assert len(driver.bundles_held) == 6
    assert sum(driver.bundles_held.values()) == 16, "eight versions of each name are kept"
    driver.change(Delete("", "rm"))
    driver.change(Delete("", "policy"))
    assert not driver.bundles_held
    assert driver.resident.slots.nbytes == 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"score.weight": np.zeros((1, 60), np.float32)}, r"score.weight has shape \[1, 60\] but must be \[1, 64\]"),
        ({"score.weight": np.zeros((64,), np.float32)}, r"has shape \[64\] but must be \[1, 64\]"),
        ({"score.weight": np.full((1, 64), np.nan, np.float32)}, "not finite"),
        (
            {"score.weight": np.zeros((2, 64), np.float32), "score.bias": np.zeros(3, np.float32)},
            "score.bias has shape",
        ),
        ({}, "head is missing: task_type is SEQ_CLS"),
        ({"score.bias": np.zeros(1, np.float32)}, "none that is known"),
        ({"score.dense.weight": np.zeros((1, 64), np.float32)}, "head is missing"),
        ({"score.0.weight": np.zeros((64, 64), np.float32)}, "none that is known"),
        (
            {"score.weight": np.zeros((1, 64), np.float32), "classifier.weight": np.zeros((1, 64), np.float32)},
            "none that is known",
        ),
    ],
)
def test_heads_that_do_not_fit_are_refused(driver: Driver, changes: dict[str, np.ndarray], says: str) -> None:
    with pytest.raises(AdapterDoesNotFit, match=says):
        reward_bundle(driver.model.info, head=changes)


def test_a_head_without_a_word_on_what_it_is_for_is_refused(driver: Driver) -> None:
    tensors, config = tiny_scorers.reward_adapter(driver.model.info)
    with pytest.raises(AdapterDoesNotFit, match=r"score.weight is unexpected"):
        tiny_scorers.bundle(driver.model.info, tensors, config | {"task_type": "CAUSAL_LM", "modules_to_save": None})
