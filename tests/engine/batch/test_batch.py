"""A row does not depend on its neighbours: batched equals alone, scorer equals sampler, joins and finishes disturb
nobody. `tolerance` is the one every batch-shape comparison uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from rollout_server.engine.kv_cache.sizes import row_bucket
from rollout_server.engine.messages.scoring import ScoredSequence
from rollout_server.engine.model.resident import ResidentModel
from rollout_server.engine.sampling.numerics import on_cpu
from rollout_server.engine.scheduling.latency import FIRST
from rollout_server.errors import EngineFault
from rollout_server.rollout import FinishReason, Rollout, Wants
from tests.laws.grids import some_long
from tests.support.engine.door import broken_steps, wrap_forwards
from tests.support.engine.driver import Driver, prompts_of
from tests.support.numbers.bounds import TINY, Network, assert_near

MIXED = [*range(1, 30, 3), 40, 1, 100, 64, 130, 31, 32, 33, 65, 90, 50, 70, 45, 80, 2, 12, 120, 63, 96, 3, 37, 5]
SLOTS = ["qwen3", "llama", "qwen2", "phi3", "qwen3_moe", "gemma3_text", "llama_sliding", "gpt_oss"]
# Not qwen3_next: a tiny random one amplifies the last bits of a product by 50, whatever the cache.
JOINED = ["mamba2", "granitemoehybrid", "falcon_h1", "xlstm", "lstm"]


def tolerance(driver: Driver, rows: Sequence[Rollout], network: Network = TINY) -> float:
    """Of the rows' log-probabilities: float32 products of other shapes are summed in another order."""
    driver.policies.route(0, [0])
    model = driver.model
    tokens = list(rows[0].prompt_ids + rows[0].token_ids)
    logits = model.forward(mx.array([tokens], dtype=mx.int32), model.make_caches())
    return network.of_logits(logits, max(len(row.prompt_ids) + len(row.token_ids) for row in rows))


def assert_same(one: Rollout, other: Rollout, within: float) -> None:
    assert one.token_ids == other.token_ids
    assert_near(one.logprobs, other.logprobs, within)
    assert_near(one.sampling_logprobs, other.sampling_logprobs, within)


def assert_scored(row: Rollout, score: ScoredSequence, within: float) -> None:
    """The scorer finds what the sampler said, entropy and alternatives too."""
    assert_near(row.logprobs, score.logprobs, within)
    assert_near(row.entropy, score.entropy, 10 * within)
    assert row.top_logprobs is not None and score.top_logprobs is not None
    for mine, theirs in zip(row.top_logprobs, score.top_logprobs, strict=True):
        assert theirs is not None
        assert_near([v for _, v in mine], [v for _, v in theirs], within)


@pytest.mark.parametrize("family", some_long(SLOTS + JOINED, "qwen3", "gpt_oss", "granitemoehybrid"))
def test_32_rows_of_mixed_lengths_equal_each_alone(
    family: str, bare_model: Callable[[str], ResidentModel], model_path: Callable[[str], Path]
) -> None:
    model = bare_model(family)
    assert model.info.cache == ("slots" if family in SLOTS else "batch")
    driver = Driver.start(model_path(family), model, max_batch=32, prefill_tokens=96)
    prompts = prompts_of(MIXED if family in SLOTS else MIXED[:16], model.info.vocab_size)
    together = driver.generate(prompts, max_tokens=8, ignore_eos=True)
    within = tolerance(driver, together)
    # Alone: every row for the main family, a sample of them for the others.
    chosen = range(len(prompts)) if family == "qwen3" else range(0, len(prompts), 5)
    for index in chosen:
        row = together[index]
        alone = driver.generate([prompts[index]], seeds=[[row.seed]], max_tokens=8, ignore_eos=True)[0]
        assert_same(alone, row, within)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "gemma2", "granitemoehybrid"])
def test_every_logprob_equals_the_scorer(
    family: str, bare_model: Callable[[str], ResidentModel], model_path: Callable[[str], Path]
) -> None:
    model = bare_model(family)
    driver = Driver.start(model_path(family), model, max_batch=16)
    wants = Wants(entropy=True, top_logprobs=3)
    rows = driver.generate(prompts_of([5, 30, 1, 70], model.info.vocab_size), n=2, max_tokens=10, wants=wants)
    scored = driver.score(
        [row.prompt_ids + row.token_ids for row in rows],
        [len(row.prompt_ids) for row in rows],
        entropy=True,
        top_logprobs=3,
    )
    within = tolerance(driver, rows)
    for row, score in zip(rows, scored, strict=True):
        assert len(row.token_ids) == len(row.logprobs) == len(row.sampling_logprobs) == len(row.log_kept_mass)
        assert_scored(row, score, within)


def test_a_family_that_cannot_be_batched_is_served_row_by_row(
    bare_model: Callable[[str], ResidentModel], model_path: Callable[[str], Path]
) -> None:
    model = bare_model("gemma2")
    assert (model.info.cache, model.info.max_batch) == ("serial", 1)
    driver = Driver.start(model_path("gemma2"), model)
    rows = driver.generate(prompts_of([4, 20], model.info.vocab_size), n=3, max_tokens=8, ignore_eos=True)
    assert len(rows) == 6 and all(len(row.token_ids) == 8 for row in rows)


def test_rows_that_join_and_leave_disturb_nobody(base: Driver) -> None:
    prompts = prompts_of([30, 7, 50], 286)
    expected = [base.generate([p], seed=3 + i, max_tokens=28, ignore_eos=True)[0] for i, p in enumerate(prompts)]
    ids = []
    for index, prompt in enumerate(prompts):
        ids.append(base.submit([prompt], seed=3 + index, max_tokens=28, ignore_eos=True))
        # Company that joins and leaves at other moments, some of it aborted half way.
        short = base.submit(prompts_of([90, 3, 12], 286, seed=index), n=3, max_tokens=5, ignore_eos=True)
        base.turn(3)
        base.abort(short) if index == 1 else None
        base.turn(4)
    base.finish(*ids)
    within = tolerance(base, expected)
    for id, alone in zip(ids, expected, strict=True):
        assert_same(alone, base.rollouts(id)[0], within)


def test_capacity_grows_and_shrinks_without_a_trace(base: Driver) -> None:
    long = base.submit(prompts_of([20], 286), seed=9, max_tokens=80, ignore_eos=True)
    base.turn(5)
    few = base.batch(0).store.capacity
    many = base.submit(prompts_of([6] * 40, 286), max_tokens=3, ignore_eos=True)
    base.until(lambda: base.batch(0).store.capacity > 40)
    base.finish(many)
    base.generate(prompts_of([150], 286), max_tokens=12, ignore_eos=True)
    base.until(lambda: base.batch(0).store.capacity == few)
    assert not base.over(long)
    base.finish(long)
    alone = base.generate(prompts_of([20], 286), seed=9, max_tokens=80, ignore_eos=True)[0]
    assert_same(alone, base.rollouts(long)[0], tolerance(base, [alone]))


def test_a_group_prefills_once_and_later_samples_reuse_it(
    bare_model: Callable[[str], ResidentModel], qwen: Path
) -> None:
    """Twelve samples through four rows: samples 5 to 12 start from the kept KV of the same prefill."""
    model = bare_model("qwen3")
    driver = Driver.start(qwen, model, max_batch=4)
    fed: list[int] = []
    forward = model.forward

    def counting(self: ResidentModel, tokens: mx.array, caches: list) -> mx.array:  # type: ignore[type-arg]
        fed.append(tokens.shape[1])
        return forward(tokens, caches)

    prompt = prompts_of([60], 286)[0]
    wrap_forwards(driver.batch(0), lambda _: lambda tokens, caches: counting(model, tokens, caches))
    rows = driver.generate([prompt], n=12, max_tokens=6, ignore_eos=True)
    # One chunk, which is filled up where chunks are compiled.
    (read,) = [length for length in fed if length > 1]
    assert 59 <= read < 2 * 59
    assert len({row.token_ids for row in rows}) > 6
    for row in rows[::4]:
        alone = driver.generate([prompt], seeds=[[row.seed]], max_tokens=6, ignore_eos=True)[0]
        assert_same(alone, row, tolerance(driver, [row]))


def test_kept_prompts_survive_a_cache_that_was_given_back(
    bare_model: Callable[[str], ResidentModel], qwen: Path
) -> None:
    """All rows end together and the cache was wide: it is made anew before the group's next samples are seated."""
    driver = Driver.start(qwen, bare_model("qwen3"), max_batch=2)
    driver.generate(prompts_of([900], 286), max_tokens=3, ignore_eos=True)
    for length in (1, 40):
        (prompt,) = prompts_of([length], 286, seed=length)
        rows = driver.generate([prompt], n=7, max_tokens=5, ignore_eos=True)
        for row in rows:
            alone = driver.generate([prompt], seeds=[[row.seed]], max_tokens=5, ignore_eos=True)[0]
            assert_same(alone, row, tolerance(driver, [row]))
        driver.generate(prompts_of([900], 286), max_tokens=3, ignore_eos=True)


def test_many_groups_through_few_rows(bare_model: Callable[[str], ResidentModel], qwen: Path) -> None:
    driver = Driver.start(qwen, bare_model("qwen3"), max_batch=8, prefill_tokens=16)
    prompts = prompts_of([1 + k % 9 for k in range(12)], 286)
    rows = driver.generate(prompts, n=8, max_tokens=6)
    assert [(r.prompt_index, r.sample_index) for r in rows] == [(p, s) for p in range(12) for s in range(8)]
    for row in rows[::17]:
        alone = driver.generate([prompts[row.prompt_index]], seeds=[[row.seed]], max_tokens=6)[0]
        assert_same(alone, row, tolerance(driver, [row]))


def test_samples_differ_and_see_the_prompt(base: Driver) -> None:
    first, second = prompts_of([30, 30], 286)
    rows = base.generate([first], n=8, max_tokens=16, ignore_eos=True)
    assert len({row.token_ids for row in rows}) == 8
    others = base.generate([second], n=8, max_tokens=16, ignore_eos=True)
    # The same seeds, so only the prompt can make the difference.
    assert all(a.seed == b.seed and a.token_ids != b.token_ids for a, b in zip(rows, others, strict=True))


def test_sixteen_equal_prompts_with_one_seed_give_sixteen_rollouts(base: Driver) -> None:
    prompt = prompts_of([12], 286)[0]
    rows = base.generate([prompt] * 16, seed=5, max_tokens=16, ignore_eos=True)
    assert len({row.token_ids for row in rows}) == 16


def test_a_repeated_long_prompt_gives_its_first_answer(base: Driver) -> None:
    prompt = prompts_of([300], 286)[0]
    first = base.generate([prompt], seed=1, max_tokens=24, ignore_eos=True)[0]
    again = base.generate([prompt], seed=1, max_tokens=24, ignore_eos=True)[0]
    assert (again.token_ids, again.logprobs) == (first.token_ids, first.logprobs)


def test_a_row_driven_to_nan_fails_by_name_and_its_place_is_clean(driver: Driver) -> None:
    bundle = driver.bundle(1, strength=1e25)
    driver.push("wild", bundle)
    prompt, healthy = prompts_of([20, 20], 286)
    alone = driver.generate([healthy], seed=4, max_tokens=12, ignore_eos=True)[0]
    neighbour = driver.submit([healthy], seed=4, max_tokens=12, ignore_eos=True)
    wild = driver.submit([prompt], policy="wild", max_tokens=12, ignore_eos=True)
    driver.finish(wild, neighbour)
    error = driver.error(wild)
    assert error.code == "non_finite_logits" and "wild@1" in error.message
    within = tolerance(driver, [alone])
    assert_same(alone, driver.rollouts(neighbour)[0], within)
    # The places are reused lowest first, so the next rows sit where the broken one sat.
    for row in driver.generate([healthy, healthy], seeds=[[4], [4]], max_tokens=12, ignore_eos=True):
        assert_same(alone, row, within)


def test_a_failing_step_fails_its_rows_by_name_and_the_engine_goes_on(base: Driver) -> None:
    prompt = prompts_of([10], 286)[0]
    expected = base.generate([prompt], seed=2, max_tokens=10, ignore_eos=True)[0]
    id = base.submit([prompt], seed=2, max_tokens=10, ignore_eos=True)
    base.turn(4)
    late = base.submit([prompt[:5]], max_tokens=3)
    with broken_steps(base.batch(0)):
        base.finish(id, turns=3)
    row = base.rollouts(id)[0]
    assert row.finish_reason is FinishReason.ERROR and row.error is not None
    assert row.error.code == EngineFault.code and "on fire" in row.error.message
    assert row.token_ids == expected.token_ids[: len(row.token_ids)] and row.token_ids
    base.finish(late)
    assert base.generate([prompt], seed=2, max_tokens=10, ignore_eos=True)[0].token_ids == expected.token_ids


def test_admission_stays_inside_the_kv_memory(bare_model: Callable[[str], ResidentModel], qwen: Path) -> None:
    model = bare_model("qwen3")
    limit = 8 * 96 * model.info.kv_bytes_per_token
    small = replace(model, info=replace(model.info, kv_memory=limit, max_batch=64))
    driver = Driver.start(qwen, small)
    id = driver.submit(prompts_of([20] * 20, 286), max_tokens=40, ignore_eos=True)
    largest = 0
    while not driver.over(id):
        driver.turn()
        largest = max(largest, driver.batch(0).store.nbytes)
    assert 0 < largest <= limit
    assert len(driver.rollouts(id)) == 20 and all(len(row.token_ids) == 40 for row in driver.rollouts(id))


def test_kv_is_written_in_place(base: Driver) -> None:
    """A live view of a KV array at the time of a write would copy the whole array: 48 rows × 1,500 columns."""
    id = base.submit(prompts_of([1400] + [10] * 47, 286), max_tokens=60, ignore_eos=True)
    base.until(lambda: base.status.running == 48 and not base.batches.joining)
    base.turn(3)
    held = base.batch(0).store.nbytes
    mx.synchronize()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    base.turn(6)
    per_layer = held / len(base.batch(0).store.layers)
    assert mx.get_peak_memory() - before < 0.5 * per_layer
    base.abort(id)
    base.finish(id)


def test_a_long_row_is_admitted_after_many_short_ones(bare_model: Callable[[str], ResidentModel], qwen: Path) -> None:
    """The cache the short rows left behind must not count against it."""
    model = bare_model("qwen3")
    small = replace(model, info=replace(model.info, kv_memory=1000 * model.info.kv_bytes_per_token, max_batch=8))
    driver = Driver.start(qwen, small)
    driver.generate(prompts_of([10] * 8, 286), max_tokens=10, ignore_eos=True)
    id = driver.submit(prompts_of([400], 286), max_tokens=80, ignore_eos=True)
    driver.finish(id, turns=200)
    assert len(driver.rollouts(id)[0].token_ids) == 80
    assert driver.batch(0).store.nbytes <= small.info.kv_memory


@pytest.mark.parametrize("family", some_long(["mamba2", "falcon_h1"], "mamba2"))
def test_joined_rows_stay_inside_the_kv_memory(
    family: str, bare_model: Callable[[str], ResidentModel], model_path: Callable[[str], Path]
) -> None:
    model = bare_model(family)
    limit = 3 * model.info.row_bytes(40)
    small = replace(model, info=replace(model.info, kv_memory=limit, max_batch=64))
    driver = Driver.start(model_path(family), small)
    id = driver.submit(prompts_of([20] * 8, 286), max_tokens=20, ignore_eos=True)
    largest = 0
    while not driver.over(id):
        driver.turn()
        largest = max(largest, driver.batch(0).store.nbytes)
    assert 0 < largest <= limit
    assert all(len(row.token_ids) == 20 for row in driver.rollouts(id))


def test_a_group_joins_without_copying_the_cache(base: Driver) -> None:
    id = base.submit(prompts_of([1400] + [10] * 39, 286), max_tokens=60, ignore_eos=True)
    base.until(lambda: base.status.running == 40 and not base.batches.joining)
    base.turn(3)
    per_layer = base.batch(0).store.nbytes / len(base.batch(0).store.layers)
    group = base.submit(prompts_of([20], 286), n=8, max_tokens=5, ignore_eos=True)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    base.turn(2)
    assert base.status.running == 48
    assert mx.get_peak_memory() - before < 0.5 * per_layer
    base.abort(id)
    base.finish(id, group)


def test_a_stopped_row_s_last_look_ahead_leaves_nothing_behind(
    bare_model: Callable[[str], ResidentModel], qwen: Path
) -> None:
    """The token after a stop is computed and dropped: its numbers are never looked at, and here they are infinite."""
    driver = Driver.start(qwen)
    prompt = prompts_of([10], 286)[0]
    free = driver.generate([prompt], seed=1, max_tokens=30, ignore_eos=True)[0]
    stop = free.token_ids[6]
    embedding = driver.model.module.model.embed_tokens
    embedding.weight[stop] = mx.full(embedding.weight.shape[1:], mx.inf)
    # The head is tied: take the row out of it again by sampling greedily from a model whose logits stay finite.
    healthy = [token for token in prompts_of([12], 286, seed=9)[0] if token != stop]
    wrap_forwards(
        driver.batch(0),
        lambda forward: (
            lambda tokens, caches: mx.nan_to_num(forward(tokens, caches), nan=-50.0, posinf=-50.0, neginf=-50.0)
        ),
    )
    ended = driver.generate([prompt], n=2, seed=1, max_tokens=30, stop_token_ids=tuple(range(200)))
    assert any(row.finish_reason is FinishReason.STOP for row in ended)
    driver.turn(3)
    store = driver.batch(0).store
    assert all(bool(mx.isfinite(layer.keys).all()) and bool(mx.isfinite(layer.values).all()) for layer in store.layers)
    assert driver.generate([healthy], max_tokens=5)[0].token_ids


def test_rows_go_on_in_more_places_while_a_long_prompt_is_read(qwen: Path, base: Driver) -> None:
    """Its places are there before its rows are: what was prepared for fewer places must not be used."""
    driver = Driver.start(qwen, base.model, prefill_tokens=8)
    short, long = prompts_of([5, 90], 286, seed=4)
    alone = driver.generate([short], n=2, max_tokens=30, temperature=1.3, top_p=0.9, ignore_eos=True)
    first = driver.submit([short], n=2, max_tokens=30, temperature=1.3, top_p=0.9, ignore_eos=True)
    driver.until(lambda: bool(driver.batches.rows))
    second = driver.submit([long], n=3, max_tokens=4, ignore_eos=True)
    driver.finish(first, second)
    for one, other in zip(alone, driver.rollouts(first), strict=True):
        assert other.error is None
        assert_same(one, other, tolerance(driver, [one]))


@pytest.mark.parametrize(("rows", "samples"), [(2, 3), (16, 1), (16, 8)])
def test_a_prompt_that_is_read_makes_no_step_wider(
    rows: int, samples: int, bare_model: Callable[[str], ResidentModel], qwen: Path
) -> None:
    """On a CPU each place costs time: 17 rows step in 24 of them, and 16 in 16 while the seventeenth is being read, and
    again when it has left, also where the step in flight still computes it."""
    driver = Driver.start(qwen, bare_model("qwen3"), max_batch=32, prefer="latency")
    batch = driver.batch(0)
    places = [0]
    wrap_forwards(batch, lambda forward: lambda *given: places.append(given[0].shape[0]) or forward(*given))
    stay = driver.submit(prompts_of([5, 6, 7] * 6, 286)[:rows], seed=1, max_tokens=60, ignore_eos=True)
    driver.until(lambda: len(batch.rows) == rows)
    join = driver.submit(prompts_of([330], 286, seed=5), seed=2, n=samples, max_tokens=4, ignore_eos=True)
    driver.turn()
    reserved = batch.store.capacity
    assert reserved == row_bucket(rows + samples, 32) > rows and driver.batches.joining
    narrow = rows if on_cpu() else reserved  # Elsewhere each width is compiled.
    beside = []
    while driver.batches.joining:
        beside.append(places[-1])
        driver.turn()
    assert beside == [narrow] * len(beside) and len(beside) >= 330 // FIRST - 1
    assert places[-1] == reserved
    driver.until(lambda: driver.over(join))
    driver.turn(3)
    assert places[-1] <= narrow and len(batch.rows) == rows
    driver.finish(stay)
    for row in [*driver.rollouts(stay), *driver.rollouts(join)]:
        (alone,) = driver.generate([row.prompt_ids], seeds=[[row.seed]], max_tokens=len(row.token_ids), ignore_eos=True)
        assert_same(alone, row, tolerance(driver, [alone]))
