"""`generate`: the text of a running server, or of one that is started for it, as the server's own routes give it."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner, Result

from rollout_server.cli import app
from rollout_server.commands.generate import harmless
from tests.support.live_server import Server


def generate(*arguments: str, given: str | None = None) -> Result:
    return CliRunner().invoke(app, ["generate", *arguments], input=given)


def completion(server: Server, path: str = "completions", **fields: object) -> dict[str, object]:
    asked = {"model": "base", "max_tokens": 12, **fields}
    reply = httpx.post(f"{server.url}/v1/{path}", json=asked, trust_env=False)
    assert reply.status_code == 200, reply.text
    (choice,) = reply.json()["choices"]
    return choice


def test_the_text_of_a_running_server(server: Server) -> None:
    options = ["--url", server.url, "--max-tokens", "12", "--seed", "3", "--temperature", "0.7", "--top-k", "40"]
    expected = completion(server, prompt="the end", seed=3, temperature=0.7, top_k=40)
    for done in (
        generate("the end", *options),
        generate(*options, given="the end\n"),
        generate("-", *options, given="the end"),
    ):
        assert done.exit_code == 0, done.output
        assert done.stdout == f"{expected['text']}\n"
    said = json.loads(generate("the end", *options, "--json").stdout)
    assert (said["text"], said["finish_reason"]) == (expected["text"], expected["finish_reason"])
    assert said["usage"]["completion_tokens"] <= 12 and said["versions"][0]["policy"] == "base"


def test_chat_and_stops(server: Server) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}]
    expected = completion(server, "chat/completions", messages=messages, seed=1, temperature=1.0)
    done = generate("hello", "--system", "s", "--url", server.url, "--max-tokens", "12", "--seed", "1", "--json")
    said = json.loads(done.stdout)
    assert said["text"] == (expected["message"]["content"] or "")  # type: ignore[index]
    text = str(completion(server, prompt="the", seed=5)["text"])
    cut = text[len(text) // 2 :][:1]
    done = generate("the", "--url", server.url, "--max-tokens", "12", "--seed", "5", "--stop", cut)
    assert done.stdout == text.partition(cut)[0] + "\n"


@pytest.mark.long
def test_a_model_started_for_it_says_the_same(server: Server, model: Path, adapter: Path) -> None:
    expected = completion(server, prompt="the end", seed=3)["text"]
    own = ["the end", "--model", str(model), "--max-tokens", "12", "--seed", "3", "--adapter", f"p={adapter}", "--json"]
    done = generate(*own)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["text"] == expected
    adapted = json.loads(generate(*own, "--policy", "p").stdout)
    assert adapted["text"] != expected and adapted["versions"][0]["policy"] == "p"


def test_what_is_refused_is_one_sentence(server: Server, tmp_path: Path) -> None:
    for arguments, said in (
        (["--url", server.url, "--model", str(tmp_path)], "give one of the two"),
        (["--url", server.url, "--revision", "v1"], "there is no --model"),
        (["--url", server.url, "--policy", "nobody"], "There is no policy 'nobody'"),
        (["--url", server.url, "--temperature", "-1"], "temperature"),
        (["--url", "http://127.0.0.1:9"], "No rollout server answers"),
        (["--model", str(tmp_path)], "config.json"),
    ):
        refused = generate("hello", *arguments)
        assert refused.exit_code == 1 and refused.stdout == "", refused.output
        assert said in refused.stderr and refused.stderr.count("\n") == 1, refused.stderr


def test_a_terminal_gets_no_escape_sequences() -> None:
    assert harmless("a\x1b[2J\tb\né\u202e") == "a\\x1b[2J\tb\né\\u202e"
