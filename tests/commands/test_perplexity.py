"""`perplexity`: every token counts once, as a plain forward of its window predicts it; and the same by echo."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner, Result

from rollout_server.cli import app
from rollout_server.commands.perplexity import PIECE, Windows, pieces, tokenize
from rollout_server.http.routes.vllm.tokenizer import MOST_CHARACTERS
from tests.support.live_server import Server
from tests.support.numbers.bounds import TINY
from trainer_client import RolloutClient

ROOT = Path(__file__).parent.parent.parent
TEXT = "The cat sat on the mat, and the dog — naïvely — ran. 你好! " * 6
PRINTED = TINY.of_logprobs([], 400) + 1e-4
"""Relative: two runs read the text, of about 300 tokens, in chunks of their own, and print four decimals."""


def perplexity(*arguments: str, given: str | None = None) -> Result:
    return CliRunner().invoke(app, ["perplexity", *arguments], input=given)


def figures(*arguments: str) -> dict[str, object]:
    done = perplexity(*arguments, "--json")
    assert done.exit_code == 0, done.output
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def pushed(server: Server, adapter: Path) -> Iterator[str]:
    """The name of a policy that is there for one test: others count what the server has."""
    with RolloutClient(server.url) as client:
        client.push("pushed", adapter)
        yield "pushed"
        client.delete_policy("pushed")


def expected(model: Path, window: int, stride: int) -> tuple[int, float]:
    """Tokens and nats each, the slow way: token by token, from the first window that holds it."""
    ids = AutoTokenizer.from_pretrained(model).encode(TEXT)
    module, _ = mlx_lm.load(str(model))
    total, cache = 0.0, {}
    for at in range(1, len(ids)):
        begin = next(begin for begin in range(0, len(ids), stride) if at < begin + window)
        if begin not in cache:
            logits = np.array(module(mx.array([ids[begin : begin + window]]))[0], np.float64)
            cache[begin] = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        total -= cache[begin][at - begin - 1, ids[at]]
    return len(ids) - 1, total / (len(ids) - 1)


@pytest.mark.parametrize(
    ("window", "stride"), [pytest.param(2048, 1024, marks=pytest.mark.long), (64, 16), (50, 49), (2, 1)]
)
def test_it_is_that_of_plain_forwards(server: Server, model: Path, text: Path, window: int, stride: int) -> None:
    options = ["--url", server.url, "--window", str(window), "--stride", str(stride)]
    found = figures(str(text), *options)
    tokens, nll = expected(model, window, stride)
    assert (found["tokens"], found["bytes"], found["policy"]) == (tokens, len(TEXT.encode()), "base")
    within = TINY.of_logprobs([], window)
    assert found["nll"] == pytest.approx(nll, abs=within)
    assert found["perplexity"] == pytest.approx(math.exp(nll), rel=within)
    assert found["bits_per_byte"] == pytest.approx(nll * tokens / math.log(2) / len(TEXT.encode()), rel=within)


@pytest.mark.long
def test_a_text_longer_than_a_request_may_have_is_tokenized_in_parts(server: Server, model: Path) -> None:
    """What this tokenizer makes of lines does not reach across their ends, so the parts are the whole."""
    lines = "".join(f"{n} and {n + 1} make {2 * n + 1}, naïvely\n" for n in range(MOST_CHARACTERS // 24))
    assert len(lines) > MOST_CHARACTERS
    with RolloutClient(server.url) as client:
        found = tokenize(client, lines)
    assert found == AutoTokenizer.from_pretrained(model).encode(lines)


@pytest.mark.parametrize(
    "text", ["", "a\n", "a" * PIECE, "a" * (PIECE + 1), "\n" * (2 * PIECE), ("b" * 999 + "\n") * 2500]
)
def test_parts_are_the_whole_text_and_end_where_a_line_does(text: str) -> None:
    parts = list(pieces(text))
    assert "".join(parts) == text and all(0 < len(part) <= PIECE for part in parts if text)
    assert all(part.endswith("\n") or "\n" not in part for part in parts[:-1])


def test_every_token_is_read_in_the_first_window_that_holds_it() -> None:
    for length in (2, 7, 8, 9, 31):
        for window in range(2, 12):
            for stride in range(1, window):
                scored = []
                for begin, first, end in Windows(length, window, stride):
                    assert begin % stride == 0 and end - begin <= window and begin < first < end
                    scored += range(first, end)
                assert scored == list(range(1, length))


@pytest.mark.long
def test_a_policy_and_a_model_of_its_own(server: Server, model: Path, adapter: Path, pushed: str, text: Path) -> None:
    found = figures(str(text), "--policy", pushed, "--url", server.url, "--window", "100")
    base = figures(str(text), "--url", server.url, "--window", "100")
    assert (found["policy"], found["stride"]) == (pushed, 50)
    assert abs(found["nll"] - base["nll"]) > 1e-3  # type: ignore[operator]
    own = ["--model", str(model), "--adapter", f"mine={adapter}", "--policy", "mine", "--window", "100"]
    assert figures(str(text), *own)["nll"] == pytest.approx(found["nll"], abs=TINY.of_logprobs([], 100))


def test_what_it_says(server: Server, text: Path) -> None:
    done = perplexity(str(text), "--url", server.url)
    assert re.fullmatch(
        r"base@0: perplexity \d+\.\d{4}, \d\.\d{4} nats a token, \d\.\d{4} bits a byte, over \d+ tokens\n", done.stdout
    )
    assert "tokens read" in done.stderr
    again = perplexity("-", "--url", server.url, given=TEXT).stdout
    numbers, others = ([float(number) for number in re.findall(r"\d+\.\d+", said)] for said in (done.stdout, again))
    # The second run reads a prefix that the first left, in other chunks: the last bits of float32 differ.
    assert others == pytest.approx(numbers, rel=PRINTED)


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        (b"\xff\xfe", [], "is not UTF-8 text"),
        (b"", [], "fewer than two tokens"),
        (b"the cat", ["--window", "1"], "--window is 1"),
        (b"the cat", ["--window", "999999"], "the context of this model"),
        (b"the cat", ["--window", "8", "--stride", "8"], "--stride is 8"),
        (b"the cat", ["--stride", "0"], "--stride is 0"),
        (b"the cat", ["--policy", "nobody"], "nobody"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    server: Server, tmp_path: Path, content: bytes, options: list[str], says: str
) -> None:
    (tmp_path / "text").write_bytes(content)
    done = perplexity(str(tmp_path / "text"), "--url", server.url, *options)
    assert done.exit_code == 1 and done.stdout == ""
    *_, last = done.stderr.splitlines()
    assert last.startswith("rollout-server: ") and says in last


def test_a_file_that_is_not_there(server: Server) -> None:
    done = perplexity("/nowhere/text", "--url", server.url)
    assert done.exit_code == 1 and "/nowhere/text" in done.stderr


def test_the_echo_recipe_gives_the_same_as_written(server: Server, text: Path, tmp_path: Path) -> None:
    example = (ROOT / "examples" / "clients" / "echo_perplexity.py").read_text(encoding="utf-8")
    assert "http://127.0.0.1:8000" in example
    (tmp_path / "example.py").write_text(example.replace("http://127.0.0.1:8000", server.url))
    run = [sys.executable, str(tmp_path / "example.py"), str(text)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = figures(str(text), "--url", server.url)
    said = re.fullmatch(r"base@0: perplexity (\d+\.\d{4})\n", done.stdout)
    assert said and float(said[1]) == pytest.approx(found["perplexity"], rel=PRINTED)


def test_an_adapter_loaded_through_vllm_s_door_is_the_one_pushed(
    server: Server, adapter: Path, pushed: str, text: Path
) -> None:
    def ask(door: str, **more: str) -> str:
        body = {"lora_name": "loaded", **more}
        return httpx.post(f"{server.url}/v1/{door}_lora_adapter", json=body, trust_env=False).text

    assert ask("load", lora_path=str(adapter)) == "Success: LoRA adapter 'loaded' added successfully."
    found, expected = (figures(str(text), "--policy", name, "--url", server.url) for name in ("loaded", pushed))
    assert found["digest"] == expected["digest"]
    assert found["nll"] == pytest.approx(expected["nll"], abs=TINY.of_logprobs([], 2048))
    assert ask("unload") == "Success: LoRA adapter 'loaded' removed successfully."
    assert perplexity(str(text), "--policy", "loaded", "--url", server.url).exit_code == 1
