"""A picture at which the tower fails takes along whoever is being read and shows it, and nobody else; and what a step
that failed leaves behind is nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from adapters.kernels.decode import DecodeKernel
from rollout_server.errors import EngineFault
from rollout_server.rollout import FinishReason
from tests.support.engine.driver import Driver
from tests.support.numbers.host_kernels import TEXTS, host_compiler
from tests.support.pictures.seeing import Seeing, opened

GREEDY = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 12}


@pytest.fixture(scope="module")
def seeing() -> Iterator[Seeing]:
    with opened("qwen2_5_vl") as found:
        yield found


def asked(driver: Driver, seeing: Seeing, *names: str, **options: object) -> str:
    shown = [seeing.conversations[name] for name in names]
    return driver.submit([each.ids for each in shown], pictures=[each.pictures for each in shown], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("chunk", [7, 512], ids=["in chunks", "at once"])
def test_a_picture_that_the_tower_fails_at_fails_its_prompt_alone(seeing: Seeing, chunk: int) -> None:
    plain = seeing.start()
    expected = {name: plain.generate([each.ids], pictures=[each.pictures], **GREEDY)[0].token_ids
                for name, each in seeing.conversations.items()}  # fmt: skip
    broken = seeing.conversations["two"].pictures[0]
    driver = seeing.start(fails_at=[broken], prefill_tokens=chunk)
    running = asked(driver, seeing, "none", **GREEDY)
    driver.turn(3)
    wrong = asked(driver, seeing, "two", n=2, **GREEDY)
    mixed = asked(driver, seeing, "two", "one", n=2, **GREEDY)
    right = asked(driver, seeing, "middle", **GREEDY)
    driver.finish(running, wrong, mixed, right, turns=120)
    assert driver.error(wrong).code == "engine_fault"
    assert "tower" in driver.error(wrong).message and "stumbles" in driver.error(wrong).message
    for id, name in ((running, "none"), (right, "middle")):
        assert [row.token_ids for row in driver.rollouts(id)] == [expected[name]]
    first, second, *others = driver.rollouts(mixed)
    assert {first.finish_reason, second.finish_reason} == {FinishReason.ERROR} and not first.token_ids
    assert [row.token_ids for row in others] == [expected["one"]] * 2
    assert driver.batches.size == 0 and not driver.status.waiting


def test_what_is_scored_beside_it_is_scored(seeing: Seeing) -> None:
    two, middle = seeing.conversations["two"], seeing.conversations["middle"]
    driver = seeing.start(fails_at=[two.pictures[0]], prefill_tokens=7)
    wrong = driver.ask_score([middle.ids, two.ids], pictures=(middle.pictures, two.pictures))
    right = driver.ask_score([middle.ids], pictures=(middle.pictures,))
    assert driver.scored(right)[0].logprobs == pytest.approx(
        seeing.start().score([middle.ids], pictures=(middle.pictures,))[0].logprobs, abs=middle.within
    )
    with pytest.raises(EngineFault, match="tower"):
        driver.scored(wrong)
    assert not driver.score_jobs and not driver.reader.size


@pytest.mark.long
def test_rows_that_come_back_fail_with_their_tokens_and_those_that_never_left_go_on(seeing: Seeing) -> None:
    conversation, broken = seeing.conversations["two"], []
    options = {"max_tokens": 200, "ignore_eos": True, "seed": 5}
    expected = seeing.start().generate([conversation.ids], pictures=[conversation.pictures], n=3, **options)
    driver = seeing.start(fails_at=broken, kv_memory=400 * seeing.model.info.kv_bytes_per_token, prefix_cache=False)
    id = asked(driver, seeing, "two", n=3, **options)
    driver.until(lambda: bool(driver.batches.preempted))
    broken += conversation.pictures
    assert driver.model.eyes is not None
    driver.model.eyes.clear()
    driver.finish(id)
    rows = driver.rollouts(id)
    assert rows[0].token_ids == expected[0].token_ids
    failed = [row for row in rows if row.finish_reason is FinishReason.ERROR]
    assert any(row.token_ids for row in failed)
    for row in failed:
        assert row.error is not None and "tower" in row.error.message
        assert row.token_ids == expected[row.sample_index].token_ids[: len(row.token_ids)]
    broken.clear()
    assert len(driver.generate([conversation.ids], pictures=[conversation.pictures], **GREEDY)[0].token_ids) == 12


def test_a_beginning_that_cannot_be_copied_fails_the_rows_of_its_set_alone(seeing: Seeing) -> None:
    driver, conversation = seeing.start(), seeing.conversations["two"]
    driver.push("other", driver.bundle(2), mode="merged")
    driver.generate([conversation.ids], pictures=[conversation.pictures], **GREEDY)
    running = asked(driver, seeing, "none", policy="other", **(GREEDY | {"max_tokens": 40}))
    driver.turn(3)
    # Its batch is there, so that its store can be broken.
    beside = asked(driver, seeing, "none", **(GREEDY | {"max_tokens": 40}))
    driver.turn(3)

    def broken(*_: object) -> None:
        raise RuntimeError("no memory for a copy")

    driver.batch(0).store.paste = broken
    wrong = asked(driver, seeing, "two", **GREEDY)
    driver.finish(running, beside, wrong)
    assert "no memory for a copy" in driver.error(wrong).message
    assert driver.rollouts(beside)[0].finish_reason is FinishReason.ERROR
    (row,) = driver.rollouts(running)
    assert row.finish_reason is FinishReason.LENGTH and len(row.token_ids) == 40


class Fused(DecodeKernel):
    """Notes how many layers each launch computes, and fails once it has been asked `fuse` times more."""

    launches: list[int]
    fuse = 0

    def takes(self, *asked: Any) -> bool:
        self.fuse -= 1
        if self.fuse == 0:
            raise ValueError("The fuse blew.")
        return super().takes(*asked)

    def __call__(self, x: mx.array, rows: mx.array, layers: Sequence[Any]) -> list[mx.array]:
        self.launches.append(len(layers))
        return super().__call__(x, rows, layers)


@pytest.mark.long
def test_layers_share_their_input_again_after_a_forward_that_failed_between_them(
    model_path: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    kernel = Fused(next(iter(TEXTS.values())), host_compiler(tmp_path_factory))
    kernel.launches = []
    # Layers are mounted on a model of the test's own.
    driver = Driver.start(model_path("llama"))
    driver = Driver.start(model_path("llama"), replace(driver.model, adapter_kernel=kernel))
    driver.push("policy", driver.bundle(1))
    prompt, options = list(range(5, 17)), {"policy": "policy", "temperature": 0.0, "ignore_eos": True, "max_tokens": 9}
    (expected,) = driver.generate([prompt], **options)
    shared = kernel.launches.copy()
    assert 3 in shared
    id = driver.submit([prompt], **options)
    driver.until(lambda: bool(driver.batches.size))
    driver.turn(2)
    # One layer is asked whether it goes by the kernel, then all three for it, and then the second for itself.
    kernel.fuse = 5
    driver.finish(id)
    (row,) = driver.rollouts(id)
    assert row.error is not None and "The fuse blew" in row.error.message
    kernel.launches.clear()
    (again,) = driver.generate([prompt], **options)
    assert (again.token_ids, again.logprobs) == (expected.token_ids, expected.logprobs)
    assert kernel.launches == shared
