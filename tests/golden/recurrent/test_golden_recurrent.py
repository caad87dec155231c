"""Our LSTM against log-probabilities that torch computed with the state dicts beside this file, which `make_golden.py`
wrote: read whole, in chunks, in company, and sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file

from rollout_server.models.recurrent.from_torch import convert
from tests.support.engine.driver import Driver
from tests.support.numbers.bounds import Network, assert_near
from tests.support.tiny_models import VOCAB_SIZE, write_tokenizer

HERE = Path(__file__).parent
NAMES = sorted(path.parent.name for path in HERE.glob("*/state.safetensors"))
NETWORK = Network(3, 32 + 28, VOCAB_SIZE)
"""A gate is the sum of two products."""


def started(name: str, directory: Path, **options: Any) -> Driver:
    state: dict[str, mx.array] = mx.load(str(HERE / name / "state.safetensors"))  # type: ignore[assignment]
    convert(state, directory, embedding="words", lstm="rnn", head="out")
    write_tokenizer(directory)
    return Driver.start(directory, **options)


@pytest.mark.parametrize("name", NAMES)
def test_log_probabilities_are_those_of_torch(name: str, tmp_path: Path) -> None:
    reference = load_file(HERE / name / "reference.safetensors")
    longest = int(reference["lengths"].max())
    prompts = [part.tolist() for part in np.split(reference["prompts"], np.cumsum(reference["lengths"])[:-1])]
    within = min(1e-4, NETWORK.of_logprobs(reference["base"], longest))
    for chunk in (512, 7):
        driver = started(name, tmp_path, prefill_tokens=chunk)
        scored = driver.score(prompts)
        assert_near(np.concatenate([each.logprobs[1:] for each in scored]), reference["base"], within, f"{chunk}")
    # Each prompt begins with its first tokens, and the rest is what a row may sample there and nothing else.
    expected = np.split(reference["base"], np.cumsum(reference["lengths"] - 1)[:-1])
    for prompt, known in zip(prompts, expected, strict=True):
        half = len(prompt) // 2
        if not half:
            continue
        ids = [
            driver.submit(
                [prompt[: half + at]], max_tokens=1, ignore_eos=True, logit_bias=((prompt[half + at], 100.0),)
            )
            for at in range(4)
        ]
        driver.finish(*ids)
        rows = [driver.rollouts(id)[0] for id in ids]
        assert [row.token_ids[0] for row in rows] == prompt[half : half + 4]
        assert_near([row.logprobs[0] for row in rows], known[half - 1 : half + 3], within, "sampled")


def test_all_that_a_torch_module_may_have_is_there() -> None:
    assert NAMES == ["bare", "plain", "tied"]
