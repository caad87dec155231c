"""`score`: texts, files and queries, against what the routes say."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from rollout_server.cli import app
from rollout_server.commands.score import AT_ONCE, in_parts
from rollout_server.commands.serve import greet
from rollout_server.engine.messages.options import EngineOptions, Task
from rollout_server.engine.model.load import load as load_model
from tests.support import tiny_scorers
from tests.support.live_server import Server, server_here
from trainer_client import RolloutClient

TEXTS = ["the cat", "a dog sat", "he \x1b[31mran"]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with server_here(tiny_scorers.build("llama", tmp_path_factory.mktemp("rm"))) as live:
        yield live


def score(*arguments: str, given: str | None = None) -> Result:
    return CliRunner().invoke(app, ["score", *arguments], input=given)


def rewards(judge: Server, sequences: list[Any], **fields: Any) -> list[float]:
    reply = httpx.post(f"{judge.url}/v1/rewards", json={"sequences": sequences, **fields}, timeout=60)
    return [entry["value"] for entry in reply.raise_for_status().json()["rewards"]]


def test_texts_and_their_scores(judge: Server) -> None:
    expected = rewards(judge, [{"text": text} for text in TEXTS])
    for done in (score(*TEXTS, "--url", judge.url), score("--url", judge.url, given="\n".join(TEXTS))):
        assert done.exit_code == 0, done.output
        lines = [line.split("\t") for line in done.stdout.splitlines()]
        assert [float(value) for value, _ in lines] == pytest.approx(expected, rel=1e-5)
        assert lines[0][1] == "the cat"
        assert "\x1b" not in done.stdout


def test_a_file_of_json_lines(judge: Server, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    path = tmp_path / "many.jsonl"
    path.write_text(
        "\n".join(map(json.dumps, ["the cat", messages, [5, 6, 7], {"text": "a", "add_special_tokens": False}]))
    )
    done = score("--file", str(path), "--url", judge.url, "--probabilities", "--json")
    found = json.loads(done.stdout)
    sequences = [{"text": "the cat"}, {"messages": messages}, {"token_ids": [5, 6, 7]}, {"text": "a"}]
    expected = rewards(judge, sequences, activation="model")
    assert [entry["value"] for entry in found["rewards"]] == pytest.approx(expected, rel=1e-5)
    assert (found["policy"], found["version"], found["labels"]) == ("base", 0, [None])


def test_texts_in_the_order_of_a_query(judge: Server) -> None:
    body = {"query": "who sat", "documents": TEXTS}
    reply = httpx.post(f"{judge.url}/rerank", json=body, timeout=60).raise_for_status().json()
    found = json.loads(score(*TEXTS, "--query", "who sat", "--url", judge.url, "--json").stdout)
    assert [entry["index"] for entry in found["results"]] == [entry["index"] for entry in reply["results"]]
    first = score(*TEXTS, "--query", "who sat", "--url", judge.url).stdout.splitlines()[0]
    assert float(first.split("\t")[0]) == pytest.approx(reply["results"][0]["relevance_score"], rel=1e-5)


def test_one_version_scores_all_requests_of_a_command(judge: Server, tmp_path: Path) -> None:
    """What is pushed between two of them scores nothing of it, for one version is told."""
    info = load_model(EngineOptions(str(tiny_scorers.build("llama", tmp_path)), "tiny")).info
    asked = [[5, 6, 7]] * (AT_ONCE + 1)
    with RolloutClient(judge.url) as client:
        first = client.push("moving", *tiny_scorers.reward_adapter(info, 1))
        parts = in_parts(client, asked, "moving", None, "none")
        one = next(parts)
        assert client.push("moving", *tiny_scorers.reward_adapter(info, 2)).version == first.version + 1
        (other,) = parts
        assert one.version.digest == other.version.digest == first.digest
        assert other.values == pytest.approx(one.values[:1], rel=1e-5)
        assert client.rewards(asked[:1], model="moving").values != pytest.approx(one.values[:1], rel=1e-5)
        client.delete_policy("moving")
        assert len(list(in_parts(client, asked, None, None, "none"))) == 2, "of a model that never moves"


@pytest.fixture(scope="module")
def stepwise(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = tiny_scorers.build("llama", tmp_path_factory.mktemp("prm"), what="TokenClassification", labels=2)
    with server_here(made) as live:
        yield live


@pytest.mark.parametrize(
    "steps",
    ["t", {"text": "t"}, {"token_id": 9}, {"positions": [[0, 1], [2], []]}],
    ids=str,
)
def test_steps_of_a_process_reward_model(stepwise: Server, steps: Any) -> None:
    """As the route has them: a text, a token, or positions of each sequence."""
    asked = {"text": steps} if isinstance(steps, str) else steps
    body = {"sequences": [{"text": text} for text in TEXTS], "steps": asked}
    reply = httpx.post(f"{stepwise.url}/v1/rewards", json=body, timeout=60).raise_for_status().json()
    option = steps if isinstance(steps, str) else json.dumps(steps)
    found = json.loads(score(*TEXTS, "--steps", option, "--url", stepwise.url, "--json").stdout)
    assert len(found["rewards"]) == len(TEXTS)
    for own, expected in zip(found["rewards"], reply["rewards"], strict=True):
        assert (own["value"], own["scores"]) == (None, None)
        assert np.array(own["steps"]) == pytest.approx(np.array(expected["steps"]), rel=1e-5)
    lines = score(*TEXTS, "--steps", option, "--url", stepwise.url).stdout.splitlines()
    for line, expected in zip(lines, reply["rewards"], strict=True):
        told = [list(map(float, step.split(","))) for step in line.split("\t")[0].split()]
        assert np.array(told) == pytest.approx(np.array(expected["steps"]), rel=1e-4)


def test_steps_stand_behind_the_score_of_the_whole(judge: Server) -> None:
    whole = rewards(judge, [{"text": text} for text in TEXTS])
    lines = score(*TEXTS, "--steps", "the", "--url", judge.url).stdout.splitlines()
    assert [float(line.split("\t")[0]) for line in lines] == pytest.approx(whole, rel=1e-5)
    assert [len(line.split("\t")[1].split()) for line in lines] == [1, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "given", "says"),
    [
        (["a", "--steps", "{"], None, "begins like JSON"),
        (["a", "--steps", '{"positions": []}'], None, "positions for 0 sequences"),
        (["a", "--steps", "a", "--query", "b"], None, "leave --steps out"),
        (["a", "--steps", '{"place": 3}'], None, "place"),
        (["a", "--file", "b"], None, "two sources"),
        ([], "\n", "no text to score"),
        (["a", "--policy", "nobody"], None, "no policy 'nobody'"),
    ],
)
def test_what_cannot_be_scored_is_one_sentence(
    judge: Server, arguments: list[str], given: str | None, says: str
) -> None:
    done = score(*arguments, "--url", judge.url, given=given)
    assert done.exit_code == 1
    assert says in done.output


def test_lines_that_are_no_json(judge: Server, tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    for text, says in (("{", "line 1 is not JSON"), ('"a"\n5', "line 2 is no text")):
        path.write_text(text)
        assert says in score("--file", str(path), "--url", judge.url).output
    path.write_text("[1, 2]")
    assert "holds something else" in score("--file", str(path), "--query", "q", "--url", judge.url).output


def test_a_decoder_scores_nothing(server: Server) -> None:
    done = score("a", "--policy", "base", "--url", server.url)
    assert done.exit_code == 1
    assert "generates" in done.output


def test_what_a_server_that_scores_greets_with(judge: Server, capsys: pytest.CaptureFixture[str]) -> None:
    greet(judge.url, "classify", page=False, key=None)
    _, said, _, curl = capsys.readouterr().out.splitlines()
    program, *words = shlex.split(said)[1:]
    done = CliRunner().invoke(app, words)
    assert program == "rollout-server" and done.exit_code == 0, done.output
    asked = json.loads(shlex.split(curl)[-1])
    assert rewards(judge, **asked) == pytest.approx([float(done.stdout.split()[0])], rel=1e-5)


@pytest.mark.parametrize("task", ["token_classify", "embed"])
def test_what_other_models_greet_with_can_be_typed(task: Task, capsys: pytest.CaptureFixture[str]) -> None:
    greet("http://127.0.0.1:8000", task, page=True, key="ROLLOUT_API_KEY")
    *_, curl = said = capsys.readouterr().out.splitlines()
    assert json.loads(shlex.split(curl)[-1])["model"] == "base" and "Bearer $ROLLOUT_API_KEY" in curl
    commands = [shlex.split(line)[2:] for line in said if " rollout-server " in line and line.startswith("  ")]
    assert commands and all(CliRunner().invoke(app, [*words, "--help"]).exit_code == 0 for words in commands)
