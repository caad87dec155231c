"""The embedded model as it ships, and the script that makes it."""

from __future__ import annotations

import subprocess
import sys
from itertools import islice
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from rollout_server.demo.make_model import Recipe, batches, corpus, make_model
from rollout_server.demo.make_tokenizer import END, build_tokenizer, special_id
from rollout_server.demo.run import model_directory
from rollout_server.demo.trainer.task import Problem, Style, held_out_problems, lenient, training_problems

TEXTS = (
    "58+73=",
    "the sum is 131",
    "Grüße, 世界! ¿Qué? 🦜🏳️‍🌈 नमस्ते",
    "tabs\tand\r\nlines\n\n and   spaces ",
    " don't , clean . up ",
    "\x00\x7f\ufffd\u200b",
    "٣٤ ½ ²",
)


@pytest.fixture(scope="module")
def tokenizer() -> AutoTokenizer:
    return AutoTokenizer.from_pretrained(str(model_directory()))


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back_from_its_tokens(tokenizer: AutoTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids == Tokenizer.from_file(str(model_directory() / "tokenizer.json")).encode(text).ids


def test_digits_are_single_tokens(tokenizer: AutoTokenizer) -> None:
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("58+73=")) == ["5", "8", "+", "7", "3", "="]


def test_special_tokens_and_chat_template(tokenizer: AutoTokenizer) -> None:
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == (END, 1, 0)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+2="}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == ("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n1+2=<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer.encode(text)
    assert ids.count(tokenizer.eos_token_id) == 2
    messages = [*messages, {"role": "assistant", "content": "the sum"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True).endswith("the sum")


@pytest.mark.long
@pytest.mark.parametrize("wrapped", ["bare", pytest.param("chat", marks=pytest.mark.long)])
def test_the_model_is_small_and_half_knows_the_task(tokenizer: AutoTokenizer, wrapped: str) -> None:
    """Greedy answers are right in some style nearly always, and in the rewarded one less than sixty times in a hundred:
    a skill to reinforce and a choice left open."""
    assert sum(path.stat().st_size for path in model_directory().iterdir()) <= 6e6
    model = mlx_lm.load(str(model_directory()))[0]
    model.set_dtype(mx.float32)
    problems = held_out_problems(120, seed=11)
    prompts = [chat(tokenizer, each.prompt) if wrapped == "chat" else each.prompt for each in problems]
    texts = greedy(model, tokenizer, prompts)
    right = [lenient(problem, text) for problem, text in zip(problems, texts, strict=True)]
    digits = [problem.answer(Style.DIGITS) == text for problem, text in zip(problems, texts, strict=True)]
    assert sum(right) / len(right) >= 0.9
    assert 0.2 <= sum(digits) / len(digits) <= 0.6


def chat(tokenizer: AutoTokenizer, prompt: str) -> str:
    message = {"role": "user", "content": prompt}
    return tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)


def greedy(model: object, tokenizer: AutoTokenizer, prompts: list[str], max_tokens: int = 12) -> list[str]:
    """Greedy answers without any cache: nothing of the engine is used here."""
    rows = [tokenizer.encode(prompt) for prompt in prompts]
    starts = [len(row) for row in rows]
    for _ in range(max_tokens):
        width = max(map(len, rows))
        inputs = mx.array([row + [0] * (width - len(row)) for row in rows])
        last = mx.array([len(row) - 1 for row in rows])
        logits = model(inputs)[mx.arange(len(rows)), last]  # type: ignore[operator]
        for row, token in zip(rows, mx.argmax(logits, axis=-1).tolist(), strict=True):
            if row[-1] != tokenizer.eos_token_id:
                row.append(token)
    return [tokenizer.decode(row[start:]).removesuffix(END) for row, start in zip(rows, starts, strict=True)]


def test_only_training_problems_and_only_answers_are_learned() -> None:
    recipe = Recipe(batch=64)
    tokenizer = build_tokenizer(corpus(), recipe.merges)
    allowed = {problem.prompt for problem in training_problems()}
    end = special_id(tokenizer, END)
    for inputs, positions, labels in islice(batches(recipe, tokenizer, seed=0), 5):
        rows = [positions // inputs.shape[1] == row for row in range(recipe.batch)]
        for row, mine in zip(inputs, rows, strict=True):
            *answer, last = labels[mine].tolist()
            start = int(positions[mine][0] % inputs.shape[1]) + 1
            prompt = tokenizer.decode(row[:start].tolist()).removeprefix("user\n").removesuffix("\nassistant\n")
            a, b = map(int, prompt.removesuffix("=").split("+"))
            assert prompt in allowed
            assert last == end
            assert row[start : start + len(answer)].tolist() == answer
            assert lenient(Problem(a, b), tokenizer.decode(answer))


@pytest.mark.long
def test_the_same_seed_makes_the_same_model(tmp_path: Path) -> None:
    """In two processes, so that no state of this one can make them equal."""
    recipe = Recipe(hidden_size=32, layers=1, heads=2, kv_heads=1, head_dim=16, intermediate_size=32, steps=4, batch=16)
    script = (
        "import sys; from pathlib import Path;"
        "from rollout_server.machine.blas import load_fast_blas; load_fast_blas();"
        "from rollout_server.demo.make_model import Recipe, make_model;"
        f"make_model(Path(sys.argv[1]), int(sys.argv[2]), {recipe!r}, print)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "a"), "5"], check=True, timeout=120)
    for name, seed in (("b", 6), ("c", 5)):
        make_model(tmp_path / name, seed, recipe, lambda line: None)
    made = [read(tmp_path / name) for name in "ab"]
    assert made[0] == read(tmp_path / "c")
    assert made[0]["model.safetensors"] != made[1]["model.safetensors"]
    assert made[0]["tokenizer.json"] == made[1]["tokenizer.json"]
    assert set(made[0]) == {path.name for path in model_directory().iterdir()}


def test_the_tokenizer_that_ships_is_the_one_the_script_makes() -> None:
    shipped = Tokenizer.from_file(str(model_directory() / "tokenizer.json"))
    assert shipped.to_str() == build_tokenizer(corpus(), Recipe().merges).to_str()


def read(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}
