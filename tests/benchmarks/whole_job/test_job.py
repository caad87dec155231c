"""What a trainer's step asks for: exact prompts, new in every step, and an adapter that is new in every push."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from benchmarks.contenders.engine import Engine
from benchmarks.contenders.steady import SteadyRows
from benchmarks.model import widen_tokenizer
from benchmarks.whole_job.alone import PartsAlone, Rates
from benchmarks.whole_job.job import RANK, Adapter, Job, linear_layers
from rollout_server.rollout import PolicyAddress
from tests.support import tiny_models
from tests.support.live_server import until


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_models.build("qwen3", tmp_path_factory.mktemp("job") / "qwen3", vocab_size=2048)
    widen_tokenizer(path / "tokenizer.json", 2048)
    return path


def test_prompts_have_their_length_and_are_new_in_every_step(model: Path) -> None:
    job = Job(model, prompts=3, n=2, prompt_tokens=17, tokens=5)
    first, second = job.ids(1), job.ids(2)
    assert [len(ids) for ids in first + second] == [17] * 6
    assert first == job.ids(1) and not {tuple(ids) for ids in first} & {tuple(ids) for ids in second}
    assert (job.rows, job.sampled, job.read) == (6, 30, 48)
    again = [tokenizer.encode(text).ids for tokenizer in [tokens_of(model)] for text in job.texts(1)]
    assert all(abs(len(ids) - 17) <= 2 for ids in again)


def tokens_of(model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model / "tokenizer.json"))


def test_every_id_has_a_text_however_large_the_vocabulary(tmp_path: Path) -> None:
    special = tiny_models.write_tokenizer(tmp_path)
    widen_tokenizer(tmp_path / "tokenizer.json", 70000)  # More than there are pairs of bytes.
    tokenizer = tokens_of(tmp_path)
    assert tokenizer.get_vocab_size(with_added_tokens=True) == 70000
    assert sorted(tokenizer.get_vocab(with_added_tokens=True).values()) == list(range(70000))
    assert {text: tokenizer.token_to_id(text) for text in special} == special


def test_an_adapter_is_new_in_every_step_and_the_same_in_every_format(model: Path, tmp_path: Path) -> None:
    assert linear_layers(model) == tiny_models.linear_layers(model)
    adapter = Adapter.of(model)
    steps = [adapter.trained() for _ in range(3)]
    changed = [sum((one[name] != adapter.tensors[name]).sum() for name in one) for one in steps]
    assert changed == [1, 1, 1]
    assert len({one[min(one)].tobytes() for one in steps}) == 3
    saved = tiny_models.load_file(adapter.save_for_mlx_lm(tmp_path / "mlx") / "adapters.safetensors")
    layers = {path: shape for path, shape in linear_layers(model).items() if f"{path}.lora_a" in saved}
    assert layers == linear_layers(model)
    for path, (_, width) in layers.items():
        a = saved[f"{path}.lora_a"]
        assert a.shape == (width, RANK)
        np.testing.assert_array_equal(a.T, adapter.tensors[f"base_model.model.{path}.lora_A.weight"])


def test_the_parts_of_a_step_add_up() -> None:
    job = Job(Path(), prompts=2, n=4, prompt_tokens=11, tokens=5)
    assert Rates(prefill=10.0, decode=8.0).seconds(job) == 20 / 10.0 + 40 / 8.0


@pytest.mark.parametrize("rows", [1, 8, 19])
def test_steady_rows_count_what_every_row_gets_while_one_is_watched(model: Path, rows: int) -> None:
    with Engine(model, 32) as engine:
        prompts = Job(model, 2, 1, 12, 1).ids(0)
        tokens, seconds = SteadyRows(engine, prompts, rows, 6).run()
        assert tokens == rows * 6 and seconds > 0
        # The others were aborted, and nothing is left behind.
        until(lambda: engine.wait_for(engine.handle.ping(60.0)) and not engine.handle.status.running)
        with pytest.raises(Exception, match="nobody"):
            SteadyRows(engine, prompts, rows, 2, policies=[PolicyAddress("nobody")]).run()


def test_the_parts_alone_have_rates(model: Path) -> None:
    with PartsAlone(Job(model, 3, 4, 40, 6), 12) as alone:
        rates = alone.rates(1)
    assert rates.decode > 0
