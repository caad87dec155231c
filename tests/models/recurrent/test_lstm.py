"""Padding changes nothing of an LSTM, versions adapt both of its products, and what torch may hold is converted or
refused by name. Against torch: tests/golden/recurrent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map
from safetensors.numpy import load_file

from rollout_server.errors import EngineUnavailable
from rollout_server.models.recurrent.from_torch import config_of, convert, file_names, main, pushed_names
from rollout_server.models.recurrent.lstm import Model, ModelArgs
from tests.support import tiny_models
from tests.support.engine.driver import Driver, prompts_of
from tests.support.numbers.bounds import TINY, assert_near, relative
from tests.support.tiny_models import write_tokenizer

NAMES = {"embedding": "words", "lstm": "rnn", "head": "out"}
GOLDEN = Path(__file__).parents[2] / "golden" / "recurrent" / "plain" / "state.safetensors"


def test_a_row_is_what_it_is_whatever_pads_it() -> None:
    mx.random.seed(0)
    model = Model(ModelArgs("lstm", 40, 8, 2, embedding_size=5, head_bias=True))
    model.update(tree_map(lambda array: mx.random.normal(array.shape), model.parameters()))
    lengths, rows = (9, 1, 14), mx.random.randint(0, 40, (3, 14))
    caches: list[Any] = model.make_cache()
    for cache in caches:
        cache.prepare(lengths=list(lengths))
    together = mx.concatenate([model(rows[:, :5], caches), model(rows[:, 5:], caches)], axis=1)
    for cache in caches:
        cache.finalize()
    again = model(rows[:, :1], caches)
    for row, length in enumerate(lengths):
        own = model.make_cache()
        alone = model(rows[row : row + 1, :length], own)
        bound = relative(14 * 16) * max(1.0, float(mx.abs(alone).max()))
        assert_near(together[row, :length], alone[0], bound)
        assert_near(again[row], model(rows[row : row + 1, :1], own)[0], bound)


@pytest.mark.parametrize("dora", [False, True])
def test_versions_adapt_both_products_of_a_layer(dora: bool, tmp_path: Path) -> None:
    """Beside the weights, or merged into them, in one batch with the base."""
    driver = Driver.start(tiny_models.build("lstm", tmp_path))
    layers = driver.model.info.layers
    assert {f"model.layers.{at}.{part}" for at in (0, 1) for part in ("ih", "hh")} <= layers.keys()
    bundle = driver.bundle(1, dora=dora)
    assert {name.rpartition(".")[2] for name in bundle.spec.modules} >= {"ih", "hh"}
    driver.push("beside", bundle)
    driver.push("merged", bundle, mode="merged")
    prompts = prompts_of([20, 33], 286)
    ids = [driver.submit(prompts, policy=name, seed=4) for name in ("beside", "base", "merged")]
    driver.finish(*ids)
    beside, base, merged = (driver.rollouts(id) for id in ids)
    for one, other, without in zip(beside, merged, base, strict=True):
        assert one.token_ids == other.token_ids != without.token_ids
        assert_near(one.logprobs, other.logprobs, TINY.of_row(one))


def test_tensors_of_a_file_have_the_names_and_layout_of_torch(tmp_path: Path) -> None:
    state = load_file(GOLDEN)
    found = file_names(state, **NAMES)
    assert np.array_equal(found["model.layers.1.weight_hh"], state["rnn.weight_hh_l1"])
    pushed = pushed_names(state, **NAMES)
    assert np.array_equal(pushed["model.layers.1.hh.weight"], state["rnn.weight_hh_l1"])
    assert config_of(found) == {
        "architectures": ["LSTMForCausalLM"],
        "model_type": "lstm",
        "vocab_size": 320,
        "hidden_size": 28,
        "num_hidden_layers": 2,
        "embedding_size": 20,
        "bias": True,
        "head_bias": True,
        "tie_word_embeddings": False,
    }


def test_the_command_writes_what_the_server_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "model"
    given = [f"--{option}={name}" for option, name in NAMES.items()]
    monkeypatch.setattr("sys.argv", ["from_torch", str(GOLDEN), str(target), *given, "--eos-token-id", "7"])
    main()
    assert capsys.readouterr().out.strip() == str(target)
    assert json.loads((target / "config.json").read_text())["eos_token_id"] == [7]
    write_tokenizer(target)
    assert 7 in Driver.start(target).model.info.eos_token_ids
    monkeypatch.setattr("sys.argv", ["from_torch", str(GOLDEN), str(target), *given, "--lstm=gru"])
    with pytest.raises(SystemExit):
        main()
    assert "rnn.bias_hh_l0 is of none of words, gru and out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("rnn.weight_ih_l0_reverse", "bidirectional"),
        ("rnn.weight_hr_l0", "proj_size"),
        ("norm.weight", "is of none of words, rnn and out"),
    ],
)
def test_what_no_layer_computes_is_refused(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        file_names({**load_file(GOLDEN), name: np.zeros(3)}, **NAMES)


@pytest.mark.parametrize("prefix", ["words", "rnn"])
def test_what_is_missing_is_named(prefix: str) -> None:
    with pytest.raises(ValueError, match=rf"Nothing in this state dict is of {prefix}"):
        file_names({n: v for n, v in load_file(GOLDEN).items() if not n.startswith(prefix)}, **NAMES)


def test_a_head_cannot_share_an_embedding_of_another_width(tmp_path: Path) -> None:
    convert({name: mx.array(value) for name, value in load_file(GOLDEN).items()}, tmp_path, **NAMES)
    write_tokenizer(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(EngineUnavailable, match="embedding_size is 20 and hidden_size 28"):
        Driver.start(tmp_path)
