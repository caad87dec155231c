"""Versions with parameters of their own in a running engine: beside each other, across a switch, and out of memory."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import save

import adapters.resident.residency
from adapters.bundle import AdapterBundle, Content
from adapters.formats.read import read_bundle
from adapters.prepare import prepare
from rollout_server.engine.messages.versions import Delete, Restore, RestoredVersion
from rollout_server.errors import AdapterMismatch, EngineFault, PreconditionFailed, WeightsMemoryExceeded
from rollout_server.rollout import FinishReason, Rollout, Wants
from tests.engine.batch.test_batch import assert_same, tolerance
from tests.engine.scheduling.test_on_update import spans
from tests.laws.grids import some_long
from tests.support.engine.door import broken_steps
from tests.support.engine.driver import Driver, prompts_of
from tests.support.numbers.bounds import TINY, amplified, assert_near

PROMPTS = prompts_of([12, 30], 286, seed=5)
LONG = prompts_of([25], 286, seed=6)[0]


def full(driver: Driver, seed: int) -> AdapterBundle:
    """Noise on some matrices and on the last norm."""
    random = np.random.default_rng(seed)
    weights = dict(tree_flatten(driver.model.module.parameters()))
    names = [n for n in driver.model.info.weights if n.endswith(("norm.weight", "o_proj.weight", "out_proj.weight"))]
    tensors = {n: np.array(weights[_held(n, weights)]) for n in names}
    tensors = {n: (a + 0.2 * random.standard_normal(a.shape)).astype(np.float32) for n, a in tensors.items()}
    info = driver.model.info
    return read_bundle(save(tensors), {"kind": "full"}, layers=info.layers, parameters=info.weights)


def _held(name: str, weights: dict[str, Any]) -> str:
    """Where a parameter is once an adapter is wrapped around its layer."""
    path, _, key = name.rpartition(".")
    return name if name in weights else f"{path}.base.{key}"


def run(driver: Driver, policy: str) -> list[Rollout]:
    return driver.generate(PROMPTS, policy=policy, seed=3, max_tokens=16, ignore_eos=True)


def test_base_adapter_merged_and_full_rows_run_together_as_each_alone(driver: Driver) -> None:
    bare = run(driver, "base")
    driver.push("slot", driver.bundle(1))
    driver.push("merged", driver.bundle(2), mode="merged")
    driver.push("full", full(driver, 3))
    names = ["base", "slot", "merged", "full"]
    alone = {name: run(driver, name) for name in names}
    assert len({rows[0].token_ids for rows in alone.values()}) == 4
    ids = {n: driver.submit(PROMPTS, policy=n, seed=3, max_tokens=16, ignore_eos=True) for n in names}
    driver.turn(4)
    assert driver.status.running == 8 and driver.batches.sets == (0, 1, 2)
    driver.finish(*ids.values())
    for name in names:
        for one, other in zip(alone[name], driver.rollouts(ids[name]), strict=True):
            assert_same(one, other, tolerance(driver, [one]))
    again = run(driver, "base")
    assert [(r.token_ids, r.logprobs) for r in again] == [(r.token_ids, r.logprobs) for r in bare]


def test_a_merged_version_is_its_adapter_and_scores_as_it_samples(driver: Driver) -> None:
    bundle = driver.bundle(4)
    first, second = driver.push("p", bundle), driver.push("p", bundle, mode="merged")
    assert (second.version.number, second.mode, second.unchanged) == (2, "merged", False)
    assert first.version.digest == second.version.digest, "content and mode are two things"
    assert driver.push("p", bundle, mode="merged").unchanged
    driver.push("full", full(driver, 3))
    for policy in ("p@2", "full"):
        rows = run(driver, policy)
        sequences, starts = [r.prompt_ids + r.token_ids for r in rows], [len(r.prompt_ids) for r in rows]
        within = tolerance(driver, rows)
        for row, score in zip(rows, driver.score(sequences, starts, policy=policy), strict=True):
            assert_near(row.logprobs, score.logprobs, within)
        if policy == "p@2":
            for row, score in zip(rows, driver.score(sequences, starts, policy="p@1"), strict=True):
                assert_near(row.logprobs, score.logprobs, within)


def reread(driver: Driver, row: Rollout, modes: dict[int, str]) -> list[float]:
    """The row's log-probabilities by plain forwards, each token under the version its span names, KV carried along."""
    resident, caches = driver.resident, driver.model.make_caches()
    tokens, found = list(row.prompt_ids) + list(row.token_ids), []

    def use(span: Any) -> None:
        at = resident.placement(Content(span.version.digest, modes[span.version.number]))  # type: ignore[arg-type]
        resident.route(at.parameters, [at.slot])

    use(row.spans[0])
    driver.model.forward(mx.array([tokens[: len(row.prompt_ids) - 1]]), caches)
    mx.eval([cache.state for cache in caches])
    for span in row.spans:
        use(span)
        for index in range(span.start, span.end):
            at = len(row.prompt_ids) - 1 + index
            logits = driver.model.forward(mx.array([[tokens[at]]]), caches)[0, -1].astype(mx.float32)
            found.append(float(logits[tokens[at + 1]] - mx.logsumexp(logits)))
    return found


@pytest.mark.parametrize(
    "family", some_long(["qwen3", "gemma3_text", "granitemoehybrid", "falcon_h1", "gemma2"], "qwen3", "falcon_h1")
)
def test_a_switch_between_sets_carries_the_kv(family: str, model_path: Callable[[str], Path]) -> None:
    driver = Driver.start(model_path(family))
    driver.push("p", driver.bundle(1))
    # On a GPU a push takes more turns than here.
    stay = driver.submit([LONG], policy="p@1", seed=1, max_tokens=60, ignore_eos=True)
    if driver.model.info.max_batch == 1:
        driver.finish(stay)
    move = driver.submit([LONG], policy="p", seed=1, max_tokens=60, ignore_eos=True, on_update="switch")
    driver.turn(7)
    driver.push("p", full(driver, 2))
    driver.turn(4)
    driver.push("p", driver.bundle(3), mode="merged")
    driver.turn(4)
    driver.activate("p", 1)
    driver.finish(stay, move)
    (row,) = driver.rollouts(move)
    told = spans(row)
    assert [(number, kv) for number, _, _, kv in told] == [(1, None), (2, "carried"), (3, "carried"), (1, "carried")]
    assert told[0][1] == 0 and told[-1][2] == 60 and all(a[2] == b[1] for a, b in itertools.pairwise(told))
    expected = reread(driver, row, {1: "adapter", 2: "merged", 3: "merged"})
    assert_near(row.logprobs, expected, amplified(family) * TINY.of_row(row))
    (old,) = driver.rollouts(stay)
    assert row.token_ids[: told[0][2]] == old.token_ids[: told[0][2]] and row.token_ids != old.token_ids
    driver.turn(3)
    assert all(v.rows_in_use == 0 for v in driver.status.policies[0].versions)


def test_many_rows_switch_and_samples_that_start_late_follow(driver: Driver, qwen: Path) -> None:
    small = Driver.start(qwen, driver.model, max_batch=5)
    small.push("p", small.bundle(1), mode="merged")
    move = small.submit(PROMPTS, n=6, policy="p", max_tokens=20, ignore_eos=True, on_update="switch")
    bare = small.submit([LONG], policy="base", seed=4, max_tokens=60, ignore_eos=True)
    small.turn(6)
    small.push("p", full(small, 2))
    small.change(Delete("", "p", 1))
    small.finish(move, bare)
    rows = small.rollouts(move)
    assert len(rows) == 12 and {row.finish_reason for row in rows} == {FinishReason.LENGTH}
    assert {tuple(n for n, *_ in spans(row)) for row in rows} <= {(1, 2), (2,), (1,)}
    assert (1, 2) in {tuple(n for n, *_ in spans(row)) for row in rows}
    expected = small.generate([LONG], policy="base", seed=4, max_tokens=60, ignore_eos=True)
    assert small.rollouts(bare)[0].token_ids == expected[0].token_ids
    small.turn(3)
    assert all(v.rows_in_use == 0 for v in small.status.policies[0].versions)
    assert small.batches.sets in ((0,), (0, 2), (2, 0)) and small.status.sets == 1


def test_a_switch_for_which_there_is_no_kv_waits(driver: Driver) -> None:
    """The row steps aside, and goes on over KV that is built again as it was."""
    driver.push("p", driver.bundle(1))
    ids = [
        driver.submit([LONG], n=n, policy=policy, seed=1, max_tokens=30, ignore_eos=True, on_update=update)
        for policy, update, n in (("p", "switch", 1), ("base", "finish", 3))
    ]
    driver.turn(6)
    assert driver.status.running == 4
    # Exactly what runs: three rows keep the places of four.
    cells = driver.batches.cells((0, 0), 0, 55)
    driver.set_kv_limit(cells)
    driver.push("p", full(driver, 2))
    driver.turn()
    assert driver.preemptions == 1 and len(driver.batches.preempted) == 1
    driver.finish(*ids)
    (moved,), stayed = driver.rollouts(ids[0]), driver.rollouts(ids[1])
    (first, second) = spans(moved)
    assert (first[0], first[3]) == (1, None) and (second[0], second[2:]) == (2, (30, "carried"))
    expected = reread(driver, moved, {1: "adapter", 2: "merged"})
    assert_near(moved.logprobs, expected, TINY.of_row(moved))
    assert {row.finish_reason for row in stayed} == {FinishReason.LENGTH}
    driver.turn(2)
    assert all(v.rows_in_use == 0 for v in driver.status.policies[0].versions)


def test_a_batch_is_dropped_with_its_set_and_admission_counts_all(driver: Driver) -> None:
    driver.push("p", full(driver, 1))
    held = driver.submit(PROMPTS, policy="p", max_tokens=30, ignore_eos=True)
    bare = driver.submit(PROMPTS, policy="base", max_tokens=30, ignore_eos=True)
    driver.turn(4)
    batches = driver.batches
    columns = [batches[number].longest for number in (0, 1)]
    assert batches.cells((0, 0), 0, columns[0]) == sum(
        batches[n].cells(0, width) for n, width in zip((0, 1), columns, strict=True)
    )
    driver.push("p", driver.bundle(2))
    driver.change(Delete("", "p", 1))
    assert driver.status.sets == 1, "its rows still run"
    driver.finish(held, bare)
    driver.turn(2)
    assert (driver.status.sets, driver.status.set_bytes, batches.sets) == (0, 0, (0,))


def test_a_failing_step_takes_only_its_own_batch_along(driver: Driver) -> None:
    driver.push("p", full(driver, 1))
    expected = {policy: run(driver, policy) for policy in ("base", "p")}
    ids = {n: driver.submit(PROMPTS, policy=n, seed=3, max_tokens=16, ignore_eos=True) for n in ("base", "p")}
    driver.turn(5)
    with broken_steps(driver.batch(1)):
        driver.finish(*ids.values())
    for row in driver.rollouts(ids["p"]):
        assert row.finish_reason is FinishReason.ERROR and row.error is not None
        assert row.error.code == EngineFault.code and row.token_ids
    for one, other in zip(expected["base"], driver.rollouts(ids["base"]), strict=True):
        assert_same(one, other, tolerance(driver, [one]))
    assert [r.token_ids for r in run(driver, "p")] == [r.token_ids for r in expected["p"]]
    driver.turn(2)
    assert driver.status.policies[0].versions[0].rows_in_use == 0


def test_rows_of_a_batch_are_told_of_before_the_next_batch_fails(driver: Driver) -> None:
    driver.push("p", full(driver, 1))
    wants = Wants(tokens_as_they_come=True)
    kept, lost = (
        driver.submit(PROMPTS[:1], policy=name, max_tokens=16, ignore_eos=True, wants=wants) for name in ("base", "p")
    )
    driver.turn(5)
    told = len(driver.tokens(kept)), len(driver.tokens(lost))
    with broken_steps(driver.batch(1)):
        driver.turn()
    assert (len(driver.tokens(kept)), len(driver.tokens(lost))) == (told[0] + 1, told[1])
    assert driver.error(lost) is None and driver.over(lost) and not driver.over(kept)
    driver.finish(kept)


def test_the_only_batch_may_be_that_of_a_set_which_goes(driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    """Its rows took the KV of the base's batch, and then its version was deleted."""
    expected = run(driver, "base")
    driver.push("p", full(driver, 1))
    run(driver, "p")
    driver.push("q", full(driver, 2))
    run(driver, "q")
    assert 0 not in driver.batches.sets
    driver.change(Delete("", "p"))
    driver.change(Delete("", "q"))
    driver.turn(2)
    assert driver.batches.sets == (0,)
    assert [r.token_ids for r in run(driver, "base")] == [r.token_ids for r in expected]
    assert "failed" not in caplog.text


def test_no_memory_for_another_version_leaves_the_one_before(driver: Driver, qwen: Path) -> None:
    bundle = full(driver, 1)
    tight = Driver.start(qwen, driver.model, weights_memory=bundle.nbytes + 1000)
    pushed = tight.push("p", bundle)
    assert pushed.resident_bytes == bundle.nbytes
    before, held = run(tight, "p"), tight.status
    for other, mode in ((full(tight, 2), None), (tight.bundle(3), None), (tight.bundle(3), "merged")):
        with pytest.raises(WeightsMemoryExceeded, match="--weights-memory"):
            tight.push("p", other, mode=mode)
    assert (tight.status.policies, tight.status.set_bytes) == (held.policies, held.set_bytes)
    assert [(r.token_ids, r.logprobs) for r in run(tight, "p")] == [(r.token_ids, r.logprobs) for r in before]
    tight.change(Delete("", "p"))
    assert tight.push("p", full(tight, 2)).version.number == 2


def test_restored_in_their_modes(driver: Driver, qwen: Path) -> None:
    one, two = driver.bundle(1), full(driver, 2)
    driver.push("p", one, mode="merged")
    driver.push("p", two)
    expected = [[(r.token_ids, r.logprobs) for r in run(driver, f"p@{n}")] for n in (1, 2)]
    other = Driver.start(qwen)
    versions = (
        RestoredVersion(1, one, None, 1.0, False, False, "merged"),
        RestoredVersion(2, two, None, 2.0, True, False, "merged"),
    )
    other.change(Restore("", "p", 2, versions))
    assert [v.mode for v in other.status.policies[0].versions] == ["merged", "merged"]
    assert [[(r.token_ids, r.logprobs) for r in run(other, f"p@{n}")] for n in (1, 2)] == expected


def test_rows_run_on_while_a_version_is_merged(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(driver, "base")
    held = driver.submit(PROMPTS, seed=3, max_tokens=16, ignore_eos=True)
    driver.turn(3)
    monkeypatch.setattr(adapters.resident.residency, "BUILD_S", 0.0)  # one parameter between two steps
    bundle = driver.bundle(2)
    options = {"mode": "merged", "parameters": driver.model.info.weights}
    push = driver.publish("p", bundle, mode="merged", prepared=prepare(bundle, "float32", **options))
    late = driver.submit(PROMPTS, policy="p", seed=3, max_tokens=16, ignore_eos=True)
    steps = driver.status.steps
    driver.turn(8)
    assert driver.status.steps - steps == 8 and not driver.status.policies, "it is still being merged"
    driver.finish(held, late)
    assert driver.published(push).version.number == 1
    for one, other in zip(expected, driver.rollouts(held), strict=True):
        assert_same(one, other, tolerance(driver, [one]))
    assert {s.version.name for row in driver.rollouts(late) for s in row.spans} == {"p"}
    driver.activate("p", 1)
    wrong = prepare(full(driver, 3), "float32", parameters=driver.model.info.weights)
    with pytest.raises(PreconditionFailed):
        driver.push("p", wrong.bundle, prepared=wrong, if_match="9")
    assert not driver.staging and driver.status.sets == 1


def test_a_base_whose_weights_hold_factors_takes_no_version(model_path: Callable[[str], Path], tmp_path: Path) -> None:
    """mlx-lm multiplies Falcon-H1's factors into the weights that it reads; a version beside them would go without."""
    base = tmp_path / "base"
    shutil.copytree(model_path("falcon_h1"), base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"ssm_in_multiplier": 0.5}))
    driver = Driver.start(base)
    for mode in ("adapter", "merged"):
        with pytest.raises(
            AdapterMismatch, match="No version can be served on this base: mlx-lm multiplies ssm_in_mul"
        ):
            driver.push("p", driver.bundle(1), mode=mode)
    assert driver.status.policies == () and driver.generate([PROMPTS[0]], max_tokens=3)
    assert Driver.start(model_path("falcon_h1")).push("p", driver.bundle(1)).version.number == 1
