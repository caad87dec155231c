"""Keys and values in 8 bits: the format, its effect, and that it is the same effect on every path. A number at the edge
between two codes may fall on either side, so paths differ by more than in float32, but by far less than from it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import QuantizedKVCache

from rollout_server.engine.batch.length_buckets import StepCosts
from rollout_server.engine.kv_cache.eight_bit import Packing
from rollout_server.engine.kv_cache.padded_layer import Attend, DecodeAttention
from rollout_server.engine.kv_cache.prompt import Prompt
from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.model.attention.kernel import RowKernel
from rollout_server.engine.model.attention.plain import attend_plainly
from rollout_server.engine.model.resident import ResidentModel
from rollout_server.errors import EngineUnavailable
from rollout_server.rollout import Rollout
from tests.engine.scheduling.test_preemption import watched
from tests.laws.grids import some_long
from tests.support import tiny_models
from tests.support.engine.code_paths import with_own_columns
from tests.support.engine.driver import Driver, prompts_of
from tests.support.engine.loaded_models import loaded
from tests.support.numbers.host_kernels import host_compiler

DEMO = Path(__file__).parents[3] / "rollout_server" / "demo" / "model"
CLOSE = 3e-4
"""Between two paths of the trained model, where 5e-5 was seen."""
PROMPTS = prompts_of([20, 44, 9], 384, seed=3)
ASKED: dict[str, Any] = {"n": 2, "seed": 4, "max_tokens": 20, "ignore_eos": True}
EnginePath = Callable[[ResidentModel], list[Rollout]]

needs_compiler = pytest.mark.skipif(
    mx.default_device() == mx.cpu and not shutil.which("g++"), reason="MLX compiles for the CPU with g++"
)


@pytest.fixture(scope="module")
def demo() -> ResidentModel:
    """A trained model."""
    return loaded(EngineOptions(str(DEMO), "demo", kv_bits=8))


@pytest.fixture(scope="module")
def expected(demo: ResidentModel) -> list[Rollout]:
    """Rows of one batch."""
    return Driver.start(DEMO, demo).generate(PROMPTS, **ASKED)


@pytest.fixture(scope="module")
def sharp(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Driver, Driver]]:
    """Random models whose attention is so choosy that 8 bits show; in 8 bits and as they are."""
    folder = tmp_path_factory.mktemp("sharp")

    def drivers(family: str, head_dim: int = 32) -> tuple[Driver, Driver]:
        path = tiny_models.build(family, folder / f"{family}-{head_dim}", head_dim=head_dim)
        return Driver.start(path, kv_bits=8), Driver.start(path)

    return drivers


def score(driver: Driver, rows: Sequence[Rollout]) -> list[tuple[float | None, ...]]:
    sequences = [row.prompt_ids + row.token_ids for row in rows]
    return [scored.logprobs for scored in driver.score(sequences, [len(row.prompt_ids) for row in rows])]


def gaps(rows: Sequence[Rollout], others: Sequence[Sequence[float | None]]) -> np.ndarray:
    return np.concatenate(
        [np.abs(np.subtract(row.logprobs, np.array(other, float))) for row, other in zip(rows, others, strict=True)]
    )


# ---- the format ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "words"), [(32, 8 + 2), (64, 16 + 2), (96, 24 + 6), (128, 32 + 4), (192, 48 + 6)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_vectors_come_back_within_half_a_code(width: int, words: int, dtype: mx.Dtype) -> None:
    packing = Packing(width, dtype)
    vectors = (mx.random.normal((2, 3, 5, width), key=mx.random.key(1)) * mx.arange(1, 6)[:, None]).astype(dtype)
    packed = packing.pack(vectors)
    assert packed.shape == (2, 3, 5, words) and packed.dtype == mx.uint32
    back = packing.unpack(packed)
    assert back.shape == vectors.shape and back.dtype == dtype
    numbers, found = (np.array(array.astype(mx.float32)) for array in (vectors, back))
    grouped = numbers.reshape(2, 3, 5, -1, packing.group)
    code = np.repeat((grouped.max(-1) - grouped.min(-1)) / 255, packing.group, -1)
    # The rounding of the result itself, and a scale that MLX moves a little so that zero stays zero.
    rounding = {mx.float32: 1e-6, mx.float16: 2**-11, mx.bfloat16: 2**-8}[dtype] * np.abs(numbers)
    assert (np.abs(found - numbers) <= 0.51 * code + rounding + 1e-6).mean() > 0.99
    assert (np.abs(found - numbers) <= 1.01 * code + rounding + 1e-6).all()


def test_it_is_the_format_of_mlx() -> None:
    vectors = mx.random.normal((4, 7, 128), key=mx.random.key(2))
    packing = Packing(128, mx.float32)
    expected = mx.dequantize(*mx.quantize(vectors, group_size=64, bits=8), group_size=64, bits=8)
    assert mx.allclose(packing.unpack(packing.pack(vectors)), expected, rtol=0, atol=1e-6).item()
    # Words of a free place.
    assert not mx.any(packing.unpack(mx.zeros_like(packing.pack(vectors)))).item()


@pytest.mark.parametrize(
    ("family", "why"),
    [("qwen3", "heads have 24 numbers"), ("mamba2", "not columns of keys and values"), ("gemma2", "leave --kv-bits")],
)
def test_what_cannot_be_packed_is_refused(family: str, why: str, model_path: Callable[[str], Path]) -> None:
    with pytest.raises(EngineUnavailable, match=why) as raised:
        loaded(EngineOptions(str(model_path(family)), family, kv_bits=8))
    assert "leave --kv-bits out" in raised.value.message


# ---- memory --------------------------------------------------------------------------------------------------------


def test_bytes_are_counted_as_they_are(demo: ResidentModel, qwen: Path) -> None:
    full = loaded(EngineOptions(str(DEMO), "demo"))
    # Layers × keys and values × heads × (codes, a scale and an offset).
    assert demo.info.kv_bytes_per_token == 5 * 2 * 2 * (32 + 4 + 4)
    assert (demo.info.kv_bits, full.info.kv_bits) == (8, None)
    assert full.info.kv_bytes_per_token == 5 * 2 * 2 * 32 * 4

    def most(model: ResidentModel) -> int:
        """Rows that decode at once in the same memory."""
        info = replace(model.info, kv_memory=full.info.kv_bytes_per_token * 4 * 96)
        driver = Driver.start(DEMO, replace(model, info=info))
        id = driver.submit(prompts_of([30], 384), n=16, max_tokens=20, ignore_eos=True)
        found = 0
        while not driver.over(id):
            driver.turn()
            batch = driver.batches
            assert batch.nbytes <= info.kv_memory
            held = driver.memory_now()
            assert held.kv_held == batch.nbytes and held.kv_filled <= held.kv_held
            found = max(found, len(batch.rows))
        return found

    few, many = most(full), most(demo)
    assert 3 * few <= many <= 4 * few


def test_a_step_writes_in_place(demo: ResidentModel) -> None:
    store = demo.make_padded()
    prompts = [Prompt(tuple(prompt), 0) for prompt in PROMPTS]
    for prompt in prompts:
        store.begin(prompt, 1, 16384)
    store.prefill(demo.forward, [(prompt, len(prompt.tokens)) for prompt in prompts], lambda slots: None)
    offsets: list[int | None] = [len(prompt.tokens) for prompt in prompts]
    offsets += [None] * (store.capacity - len(offsets))
    store.set_positions(offsets, 16384)
    layer, peaks = store.nbytes // len(store.layers), []
    for _ in range(3):
        store.set_positions(offsets, 96)
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(demo.forward(mx.ones((store.capacity, 1), dtype=mx.int32), store.layers))
        store.evaluate()
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[-1] < layer / 2


# ---- the same on every path ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", some_long(["qwen3", "llama_sliding"], "qwen3"))
def test_it_computes_what_mlx_lm_computes_with_its_packed_cache(
    family: str, sharp: Callable[..., tuple[Driver, Driver]]
) -> None:
    """And so a prompt reads its own tokens in 8 bits, however it is cut into chunks."""
    driver, full = sharp(family)
    rows = driver.generate(prompts_of([70, 9], 286), n=2, max_tokens=40, ignore_eos=True)
    effect = gaps(rows, score(full, rows)).mean()
    assert effect > 1e-3
    module = driver.model.module
    for chunk in (7, 200):
        found = []
        for row in rows:
            tokens = row.prompt_ids + row.token_ids
            caches = [QuantizedKVCache(group_size=32, bits=8) for _ in module.layers]
            # CUDA has no quantised product of so few columns, which mlx-lm's cache begins with.
            with mx.stream(mx.cpu):
                parts = [module(mx.array([tokens[i : i + chunk]]), cache=caches) for i in range(0, len(tokens), chunk)]
                logits = mx.concatenate(parts, axis=1)[0, len(row.prompt_ids) - 1 : -1]
                chosen = mx.take_along_axis(logits, mx.array(row.token_ids)[:, None], axis=-1)[:, 0]
                found.append((chosen - mx.logsumexp(logits, axis=-1)).tolist())
        assert gaps(rows, found).mean() < effect / 20
    assert gaps(rows, score(driver, rows)).mean() < effect / 20


def alone(model: ResidentModel) -> list[Rollout]:
    driver = Driver.start(DEMO, model, prefix_cache=False, max_batch=1)
    return driver.generate(PROMPTS, **ASKED)


def chunked(model: ResidentModel) -> list[Rollout]:
    return Driver.start(DEMO, model, prefill_tokens=5).generate(PROMPTS, **ASKED)


def stepping_aside(model: ResidentModel) -> list[Rollout]:
    driver = Driver.start(DEMO, model)
    id = driver.submit(PROMPTS, **ASKED)
    driver.turn(12)
    driver.set_kv_limit(3 * 96)
    driver.turn()
    assert watched(driver, id) <= 3 * 96 * model.info.kv_bytes_per_token
    assert driver.preemptions > 0
    return driver.rollouts(id)


def found_again(model: ResidentModel) -> list[Rollout]:
    driver = Driver.start(DEMO, model)
    driver.generate(PROMPTS, **ASKED)
    rows = driver.generate(PROMPTS, **ASKED)
    assert min(row.cached_tokens for row in rows) >= 8
    return rows


def in_classes(model: ResidentModel) -> list[Rollout]:
    driver = Driver.start(DEMO, model)
    driver.set_step_costs(StepCosts(0.0, 1.0))
    id, most = driver.submit(PROMPTS, **ASKED), 0
    while not driver.over(id):
        driver.turn()
        most = max(most, driver.batches.classes(0))
    assert most > 1
    return driver.rollouts(id)


def compiled(model: ResidentModel) -> list[Rollout]:
    return Driver.start(DEMO, traced()).generate(PROMPTS, **ASKED)


def traced() -> ResidentModel:
    """The same model, whose decode steps are traced."""
    model = loaded(EngineOptions(str(DEMO), "demo", kv_bits=8, compile_decode=True))
    assert model.compiles and model.info.kv_bits == 8
    return model


def attending(groups: set[int], by: Attend = attend_plainly) -> Attend:
    """`groups` gets those of the steps, 0 for numbers that are not packed."""

    def attend(step: DecodeAttention) -> tuple[mx.array, mx.array, mx.array]:
        groups.add(step.group)
        return by(step)

    return attend


def on_own_columns(path: EnginePath, *, compiles: bool = False) -> EnginePath:
    """The same path where every row reads its own columns."""

    def rows(model: ResidentModel) -> list[Rollout]:
        groups: set[int] = set()
        found = path(with_own_columns(traced() if compiles else model, attending(groups)))
        assert groups == {32}
        return found

    rows.__name__ = f"{path.__name__}_on_own_columns{'_compiled' * compiles}"
    return rows


def together(model: ResidentModel) -> list[Rollout]:
    return Driver.start(DEMO, model).generate(PROMPTS, **ASKED)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(alone, marks=pytest.mark.long),
        chunked,
        stepping_aside,
        pytest.param(found_again, marks=pytest.mark.long),
        in_classes,
        pytest.param(compiled, marks=needs_compiler),
        *map(on_own_columns, (together, stepping_aside)),
        pytest.param(on_own_columns(found_again), marks=pytest.mark.long),
        pytest.param(on_own_columns(together, compiles=True), marks=[needs_compiler, pytest.mark.long]),
    ],
    ids=lambda path: path.__name__,
)
def test_every_path_gives_the_same_rows(path: EnginePath, demo: ResidentModel, expected: list[Rollout]) -> None:
    rows = path(demo)
    assert [row.token_ids for row in rows] == [row.token_ids for row in expected]
    assert gaps(rows, [row.logprobs for row in expected]).max() < CLOSE


@pytest.mark.parametrize("by", some_long(["plainly", "by the kernel"], "plainly"))
@pytest.mark.parametrize("family", ["gpt_oss", "llama_sliding"])
def test_own_columns_are_read_within_windows_and_beside_sinks(
    family: str, by: str, sharp: Callable[..., tuple[Driver, Driver]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    driver, full = sharp(family, 64)
    groups: set[int] = set()
    kernel = attend_plainly if by == "plainly" else RowKernel("cuda", host_compiler(tmp_path_factory))
    own = Driver.start(Path(family), with_own_columns(driver.model, attending(groups, kernel)))
    rows = own.generate(prompts_of([70, 9], 286), n=2, max_tokens=40, ignore_eos=True)
    assert groups == {64}
    effect = gaps(rows, score(full, rows)).mean()
    assert effect > 1e-3
    assert gaps(rows, score(driver, rows)).mean() < effect / 20


def test_what_was_sampled_is_scored_and_drawn_again_the_same(demo: ResidentModel, expected: list[Rollout]) -> None:
    driver = Driver.start(DEMO, demo)
    assert gaps(expected, score(driver, expected)).max() < CLOSE
    for found in driver.replay(expected):
        assert found.exact
        assert found.max_abs_logprob_difference is not None and found.max_abs_logprob_difference < CLOSE


def test_a_row_that_switches_takes_its_words_along() -> None:
    driver = Driver.start(DEMO, kv_bits=8)
    driver.push("p", driver.bundle(1, strength=0.1))
    # Another set of parameters has another batch.
    id = driver.submit(PROMPTS[:2], policy="p", on_update="switch", seed=1, max_tokens=30, ignore_eos=True)
    driver.until(lambda: min([len(row.token_ids) for row in driver.batches.rows], default=0) > 8)
    driver.push("p", driver.bundle(2, strength=0.1), mode="merged")
    driver.finish(id)
    for row, found in zip(rows := driver.rollouts(id), driver.replay(rows), strict=True):
        assert [span.kv for span in row.spans] == [None, "carried"]
        assert found.max_abs_logprob_difference is not None and found.max_abs_logprob_difference < 10 * CLOSE


# ---- what it costs in accuracy -------------------------------------------------------------------------------------


def test_its_effect_on_log_probabilities_is_small(
    demo: ResidentModel,
    sharp: Callable[..., tuple[Driver, Driver]],
    record_property: Callable[[str, object], None],
) -> None:
    packed, full = sharp("qwen3")
    pairs = {"trained": (Driver.start(DEMO, demo), Driver.start(DEMO)), "random": (packed, full)}
    bounds = {"trained": (0.05, 1e-3), "random": (0.5, 0.05)}
    for name, (ours, plain) in pairs.items():
        rows = ours.generate(prompts_of([24, 70, 9], 286), **ASKED)
        found = gaps(rows, score(plain, rows))
        record_property("effect_of_8_bit_kv", f"{name}: mean {found.mean():.1e}, max {found.max():.1e}")
        largest, mean = bounds[name]
        assert 1e-5 < found.mean() < mean and found.max() < largest
