"""Our engine against log-probabilities that transformers' code gives in float64, in families that mlx-lm computes
otherwise or where rounding goes far: the files that `make_golden.py` wrote, read in parts, and sampled in company."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rollout_server.engine.model.checkpoint.corrections.norms import EPS
from tests.support.engine.driver import Driver
from tests.support.numbers.bounds import Network, amplified, assert_near
from tests.support.tiny_models import VOCAB_SIZE, write_tokenizer

HERE = Path(__file__).parent
FAMILIES = sorted(path.parent.name for path in HERE.glob("*/reference.safetensors"))
NETWORK = Network(3, 24, VOCAB_SIZE)


def started(family: str, directory: Path, **options: Any) -> Driver:
    weights = load_file(HERE / family / "model.safetensors")
    save_file({name: value.astype(np.float32) for name, value in weights.items()}, directory / "model.safetensors")
    shutil.copy(HERE / family / "config.json", directory)
    write_tokenizer(directory)
    return Driver.start(directory, **options)


def recorded(family: str) -> tuple[list[list[int]], np.ndarray, float]:
    """Prompts, the log-probabilities of their tokens but the first ones, and what rounding may do to them."""
    found = load_file(HERE / family / "reference.safetensors")
    prompts = [part.tolist() for part in np.split(found["prompts"], np.cumsum(found["lengths"])[:-1])]
    longest = int(found["lengths"].max())
    return prompts, found["base"], min(1e-4, NETWORK.of_logprobs(found["base"], longest) * amplified(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    prompts, expected, within = recorded(family)
    driver = started(family, tmp_path, prefill_tokens=24)
    scored = driver.score(prompts)
    assert_near(np.concatenate([each.logprobs[1:] for each in scored]), expected, within, family)
    known = np.split(expected, np.cumsum([len(prompt) - 1 for prompt in prompts])[:-1])
    # The first token is the whole prompt, a part of it, or all but the last: the next is what was read there.
    cuts = [(at, own) for at, prompt in enumerate(prompts) for own in {1, len(prompt) // 2, len(prompt) - 1}]
    ids = [
        driver.submit([prompts[at][:own]], max_tokens=1, ignore_eos=True, logit_bias=((prompts[at][own], 100.0),))
        for at, own in cuts
    ]
    driver.finish(*ids)
    for (at, own), id in zip(cuts, ids, strict=True):
        (row,) = driver.rollouts(id)
        assert row.token_ids[0] == prompts[at][own]
        assert_near(row.logprobs[:1], known[at][own - 1 : own], within, f"sampled behind {own} tokens")


def test_the_files_show_what_is_corrected() -> None:
    """Norms have another eps than config.json says, and every bias of a router by group lies below zero."""
    config = json.loads((HERE / "glm4_moe_lite" / "config.json").read_text())
    assert config["n_group"] > 1 and config["rms_norm_eps"] not in EPS["glm4_moe_lite"].values()
    weights = load_file(HERE / "glm4_moe_lite" / "model.safetensors")
    biases = [value for name, value in weights.items() if name.endswith("e_score_correction_bias")]
    assert biases and all((bias < -1).all() for bias in biases)
