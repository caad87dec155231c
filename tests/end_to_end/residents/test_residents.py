"""Several models in one process, over real HTTP: each as alone, each with versions of its own, none hurt by another."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import load
from typer.testing import CliRunner

from rollout_server.cli import app
from rollout_server.config import ServerConfig
from rollout_server.engine.loop import Engine
from rollout_server.engine.messages.options import EngineOptions, ModelInfo
from rollout_server.engine.model.load import load as load_model
from rollout_server.http.server import served
from tests.laws.grids import some_long
from tests.support import tiny_models, tiny_scorers
from tests.support.golden_encoders import cross_encoder
from tests.support.live_server import until
from tests.support.numbers.bounds import TINY, Network, assert_near
from trainer_client import RolloutClient, ServerError

PROMPT = {"text": "the cat sat on the"}
TEXTS = ["the cat sat", "a dog and the rain", "he went on"]
SAMPLING = {"max_tokens": 6, "seed": 11, "ignore_eos": True}


class Models:
    """Directories of a base, and of what stands beside it."""

    def __init__(self, place: Path) -> None:
        self.base = tiny_models.build("qwen3", place / "first")
        self.beside = {
            "other": tiny_models.build("llama", place / "second", 3),
            "rm": tiny_scorers.build("llama", place / "third"),
            "enc": cross_encoder(place / "fourth"),
        }

    def config(self, **options: Any) -> ServerConfig:
        also = tuple((name, str(path)) for name, path in self.beside.items())
        return ServerConfig(model=str(self.base), also=also, port=0, **options)


class Asking:
    def __init__(self, url: str) -> None:
        self.url = url
        self.http = httpx.Client(base_url=url, timeout=120, trust_env=False)

    def ask(self, path: str, **body: Any) -> Any:
        reply = self.http.post(path, json=body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def rollouts(self, policy: str, **options: Any) -> list[dict[str, Any]]:
        body = {"policy": policy, "prompts": [PROMPT], "n": 3, "sampling": SAMPLING, **options}
        found: list[dict[str, Any]] = self.ask("/v1/rollouts", **body)["rollouts"]
        return found

    def refused(self, status: int, path: str, method: str = "POST", **body: Any) -> dict[str, Any]:
        reply = self.http.request(method, path, **({"json": body} if body else {}))
        assert reply.status_code == status, reply.text
        error: dict[str, Any] = reply.json()["error"]
        return error

    def numbers(self, model: str, kind: str) -> Any:
        """What a model gives, to be compared with what it gives alone."""
        if kind == "generate":
            return [(row["token_ids"], row["logprobs"]) for row in self.rollouts(model)]
        pairs = self.ask("/score", model=model, text_1=TEXTS[0], text_2=TEXTS[1:])
        rewards = self.ask("/v1/rewards", model=model, sequences=[{"text": text} for text in TEXTS])
        return [entry["score"] for entry in pairs["data"]], [entry["scores"] for entry in rewards["rewards"]]


NETWORKS = {"rm": TINY, "enc": Network(3, 24, 3)}
LONGEST = 32
"""Tokens of a prompt and what follows, by any of the tokenizers."""
KINDS = {"base": "generate", "other": "generate", "rm": "classify", "enc": "classify"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def several(models: Models) -> Iterator[Asking]:
    with served(models.config()) as url:
        yield Asking(url)


@pytest.fixture(scope="module")
def other(models: Models) -> ModelInfo:
    return load_model(EngineOptions(str(models.beside["other"]), "other")).info


def adapter(models: Models, seed: int, **options: Any) -> Any:
    return tiny_models.random_adapter(tiny_models.linear_layers(models.beside["other"]), 4, seed, **options)


@pytest.mark.parametrize("model", some_long(list(KINDS), "other", "enc"))
def test_each_is_to_the_bit_what_it_is_alone(model: str, several: Asking, models: Models) -> None:
    with served(ServerConfig(model=str(models.beside.get(model, models.base)), port=0)) as url:
        alone = Asking(url).numbers("base", KINDS[model])
    assert several.numbers(model, KINDS[model]) == alone


def test_a_model_answers_to_the_path_that_it_was_loaded_from(several: Asking, models: Models) -> None:
    """As verl asks a reward model, and in the call of rollouts; the reply calls the model what the request did."""
    path = str(models.beside["rm"])
    by_path, by_name = (several.ask("/classify", model=model, input="a") for model in (path, "rm"))
    assert (by_path["model"], by_path["data"]) == (path, by_name["data"])
    assert several.rollouts("base", reward={"model": path, "as": "text"})[0]["reward"]["model"]["name"] == "rm"


@pytest.mark.long
def test_traffic_on_all_of_them_at_once(several: Asking) -> None:
    quiet = {model: several.numbers(model, kind) for model, kind in KINDS.items()}

    def again(model: str) -> bool:
        return all(Asking(several.url).numbers(model, KINDS[model]) == quiet[model] for _ in range(5))

    with ThreadPoolExecutor(len(KINDS)) as pool:
        assert all(pool.map(again, KINDS))


def test_a_version_of_another_model_has_its_address(several: Asking, models: Models) -> None:
    tensors, config = adapter(models, 1)
    with RolloutClient(several.url) as client:
        pushed = client.push("p", tensors, config, model="other")
        assert (pushed.name, pushed.version, pushed.base["id"]) == ("other/p", 1, "other")
        assert client.push("other/p", tensors, config).unchanged
        second = client.push("other/p", *adapter(models, 2, dora=True), activate=False)
        assert (client.policy("other/p").live, client.policy("p", model="other").live) == (1, 1)
        assert client.weights() == () and [line.name for line in client.weights("other")] == ["other/p"]
        assert client.activate("other/p", second.version).live and client.pin("p", 1, model="other").pinned
        assert client.pin("other/p", 1, False).pinned is False
        exported = client.export("other/p", 1)
        assert exported.digest == pushed.digest
        rows = client.rollouts([[5, 6, 7]], policy=pushed, n=2, max_tokens=4)
        assert {span.policy for row in rows for span in row.spans} == {"other/p"}
        for address in ("other/p", "other/p@2", f"other/p@{second.digest}"):
            found = several.rollouts(address)
            assert {(span["policy"], span["version"]) for row in found for span in row["versions"]} == {("other/p", 2)}
            assert found[0]["token_ids"] == several.rollouts("other/p@2")[0]["token_ids"]
        ids = [card["id"] for card in several.http.get("/v1/models").json()["data"]]
        assert {"base", "other", "rm", "enc", "other/p", "other/p@1", "other/p@2"} <= set(ids)
        assert several.http.get("/v1/models/other/p@1").json()["digest"] == pushed.digest
        assert several.refused(404, "/v1/weights/p", "GET")["param"] == "name"
        assert client.delete("other/p", 1).name == "other/p"
        assert client.delete_policy("p", model="other").versions == (2,)


def test_every_route_that_takes_a_model(several: Asking, models: Models) -> None:
    with RolloutClient(several.url) as client:
        client.push("q", *adapter(models, 5), model="other")
    completed = several.http.post("/v1/completions", json={"model": "other/q", "prompt": "the cat", "max_tokens": 3})
    assert completed.status_code == 200 and completed.headers["x-policy"] == "other/q@1"
    said = several.ask(
        "/v1/chat/completions", model="other/q", messages=[{"role": "user", "content": "hi"}], max_tokens=3
    )
    assert said["choices"][0]["rollout"]["versions"][0]["policy"] == "other/q"
    embedded = several.http.post("/v1/embeddings", json={"model": "other/q", "input": "the cat"})
    assert embedded.headers["x-policy"] == "other/q@1"
    rows = several.rollouts("other/q")
    sequences = [{"token_ids": row["prompt_token_ids"] + row["token_ids"], "start": 5} for row in rows]
    scored = several.ask("/v1/logprobs", policy="other/q", sequences=sequences)
    assert scored["policy"]["name"] == "other/q" and scored["versions"][0]["policy"] == "other/q"
    own = [
        {**sequence, "versions": [{**row["versions"][0], "end": len(sequence["token_ids"]) - 5}]}
        for sequence, row in zip(sequences, rows, strict=True)
    ]
    assert several.ask("/v1/logprobs", policy="other", sequences=own)["sequences"] == scored["sequences"]
    fields = ("prompt_token_ids", "token_ids", "logprobs", "versions", "sampling", "seed")
    recorded = [{name: row[name] for name in fields} for row in rows]
    assert all(row["exact"] for row in several.ask("/v1/replay", rollouts=recorded)["rollouts"])
    probed = [{**row, "trainer_logprobs": row["logprobs"]} for row in recorded]
    assert several.ask("/v1/probe", rollouts=probed)["versions"][0]["policy"] == "other/q"
    assert several.ask("/tokenize", model="other/q", prompt="the cat")["count"] > 0
    assert several.http.get("/tokenizer_info", params={"model": "enc"}).json()["model_max_length"] == 48
    mixed = [*recorded, {name: several.rollouts("base")[0][name] for name in fields}]
    assert "other" in several.refused(400, "/v1/replay", rollouts=mixed)["message"]


def test_what_is_not_there_is_refused_by_name(several: Asking) -> None:
    body = {"prompts": [PROMPT], "sampling": SAMPLING}
    for policy in ("nobody/p", "nobody/p@3"):
        error = several.refused(404, "/v1/rollouts", policy=policy, **body)
        assert "base, other, rm, enc" in error["message"] and error["param"] == "policy"
    for policy in ("nobody", "other/nobody@2"):
        error = several.refused(404, "/v1/rollouts", policy=policy, **body)
        assert error["message"].startswith("There is no policy 'nobody'; push weights under this name first.")
        assert error["message"].endswith(" The models here are base, other, rm, enc.")
        assert (error["code"], error["param"]) == ("unknown_policy", "policy")
    assert "rm" in several.refused(400, "/v1/rollouts", policy="rm", **body)["message"]
    assert "other" in several.refused(400, "/classify", model="other", input="the cat")["message"]
    error = several.refused(404, "/v1/weights?model=nobody", "GET")
    assert error["param"] == "model" and "base, other, rm, enc" in error["message"]
    assert several.refused(400, "/v1/weights?models=rm", "GET")["param"] == "models"
    error = several.refused(400, "/v1/rewards", sequences=[{"text": "the cat"}])
    assert "rm, enc" in error["message"], "two of them give a reward"
    with RolloutClient(several.url) as client, pytest.raises(ServerError, match="what a model is called"):
        client.push("rm", {"x": np.zeros((2, 2), np.float32)}, {"peft_type": "LORA", "r": 2, "lora_alpha": 2})


@pytest.mark.parametrize("policy", ["base", "other"])
@pytest.mark.parametrize("judge", ["rm", "enc"])
def test_another_model_scores_the_rows_of_a_call(policy: str, judge: str, several: Asking) -> None:
    reward = {"model": judge, "as": "text"}
    rows = several.rollouts(policy, reward=reward, **{"return": ["text"]})
    texts = [PROMPT["text"] + row["text"] for row in rows]
    asked = several.ask("/v1/rewards", model=judge, sequences=[{"text": text} for text in texts])["rewards"]
    wanted, near = np.array([entry["value"] for entry in asked]), NETWORKS[judge].of_logits
    # In the call each row is read when it has ended, and afterwards all of them together.
    assert_near([row["reward"]["value"] for row in rows], wanted, near(wanted, LONGEST))
    assert {row["reward"]["model"]["name"] for row in rows} == {judge}
    body = {"policy": policy, "prompts": [PROMPT], "n": 3, "sampling": SAMPLING, "reward": reward}
    lines = [json.loads(line) for line in several.http.post("/v1/rollouts", json={**body, "stream": True}).iter_lines()]
    streamed = {line["sample_index"]: line["reward"]["value"] for line in lines[:-1]}
    assert_near([streamed[at] for at in range(3)], wanted, near(wanted, LONGEST))
    binary = several.http.post("/v1/rollouts", json=body, headers={"accept": "application/vnd.safetensors"})
    assert_near(load(binary.content)["reward"], wanted, near(wanted, LONGEST))


def test_a_version_of_another_model_scores_too(several: Asking, other: ModelInfo) -> None:
    with RolloutClient(several.url) as client:
        pushed = client.push("judge", *tiny_scorers.reward_adapter(other), model="other")
        (row, *_) = several.rollouts("base", reward={"model": "other/judge", "as": "text"})
        assert row["reward"]["model"] == {"name": "other/judge", "version": 1, "digest": pushed.digest}
        client.delete_policy("other/judge")


def test_commands_know_every_model(several: Asking, models: Models, tmp_path: Path) -> None:
    directory = tiny_models.save_adapter(tmp_path / "adapter", *adapter(models, 8))
    runner, url = CliRunner(), ("--url", several.url)
    pushed = runner.invoke(app, ["push", str(directory), "--name", "other/typed", *url])
    assert pushed.stdout.startswith("other/typed@1 live: ")
    assert "other/typed@1" in runner.invoke(app, ["weights", "list", "--model", "other", *url]).stdout
    said = json.loads(runner.invoke(app, ["top", "--interval", "0.1", "--json", *url]).stdout)
    assert [model["model"] for model in said["models"]] == list(KINDS)
    assert "other/typed" in [line["name"] for line in said["policies"]]
    shown = runner.invoke(app, ["top", "--interval", "0.1", "--once", *url], env={"COLUMNS": "200"}).stdout
    assert "enc: ready, 0 rows running" in shown
    assert runner.invoke(app, ["weights", "delete", "other/typed", "--all", *url]).exit_code == 0


def test_a_start_that_cannot_be_is_one_sentence(models: Models) -> None:
    other = f"other={models.beside['other']}"
    for options, sentence in (
        (
            ("--also", other, "--memory", "256KiB"),
            r"The models need [\d.]+ KiB together \(base .*, other .*--memory is 256\.0 KiB",
        ),
        (("--also", other, "--also", other), r"--also \(ROLLOUT_ALSO\): 'other' names two models"),
        (("--also", "first=/nowhere"), "--also calls a model 'first', and the model of --model is called 'first'"),
        (("--also", "rm=/nowhere"), "--also rm=/nowhere: There is no directory /nowhere"),
    ):
        refused = CliRunner().invoke(app, ["serve", "--model", str(models.base), "--port", "0", *options])
        assert refused.exit_code == 1 and re.search(f"rollout-server: {sentence}", refused.stderr), refused.stderr


def test_an_adapter_directory_serves_every_model(models: Models, tmp_path: Path) -> None:
    tiny_models.save_adapter(tmp_path / "one", *adapter(models, 9))
    with served(models.config(adapter_dir=tmp_path)) as url:
        asking = Asking(url)
        loaded = {"lora_name": "other/one", "lora_path": "one"}
        assert asking.http.post("/v1/load_lora_adapter", json=loaded).status_code == 200
        assert asking.rollouts("other/one")[0]["versions"][0]["policy"] == "other/one"
        assert asking.http.post("/v1/unload_lora_adapter", json={"lora_name": "other/one"}).status_code == 200
        assert asking.refused(404, "/v1/weights/one?model=other", "GET")["code"] == "unknown_policy"


def test_counts_are_told_by_model(several: Asking) -> None:
    before = {model["model"]: model for model in several.http.get("/health").json()["models"]}
    several.rollouts("other")
    health = several.http.get("/health").json()
    after = {model["model"]: model for model in health["models"]}
    assert list(after) == list(KINDS) and after["base"] == before["base"]
    assert after["other"]["tokens"] - before["other"]["tokens"] == 18
    assert health["tokens"] == sum(model["tokens"] for model in after.values())
    metrics = several.http.get("/metrics").text
    for model in KINDS:
        assert f'rollout_engine_state{{model="{model}",state="ready"}} 1.0' in metrics
        assert f'rollout_tokens_total{{model="{model}"}} {float(after[model]["tokens"])}' in metrics
    paused = several.ask("/v1/pause", mode="wait")
    assert paused["paused"] and all(m["paused"] == "wait" for m in several.http.get("/health").json()["models"])
    assert several.http.post("/v1/resume").json()["paused"] is False


@contextmanager
def dying(model: str) -> Iterator[None]:
    """The next turn of a model's engine is its last."""
    turn = Engine.turn

    def last(self: Engine) -> None:
        if threading.current_thread().name == f"engine {model}":
            raise MemoryError("no memory left")
        turn(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "turn", last)
        yield


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_reward_model_that_dies_costs_no_rollout(models: Models) -> None:
    with served(models.config()) as url, ThreadPoolExecutor(1) as pool:
        asking = Asking(url)
        asking.ask("/v1/pause", mode="wait")
        call = pool.submit(Asking(url).rollouts, "base", reward={"model": "rm", "as": "text"})
        until(lambda: asking.http.get("/health").json()["models"][0]["waiting"])
        with dying("rm"):
            until(lambda: asking.http.get("/health").status_code == 503)
        assert asking.http.post("/v1/resume").json()["paused"] is False
        rows = call.result()
        assert [len(row["token_ids"]) for row in rows] == [SAMPLING["max_tokens"]] * 3
        assert {row["reward"]["error"]["code"] for row in rows} == {"engine_unavailable"}
        assert "The model rm: " in asking.refused(503, "/health", "GET")["message"]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_one_does_not_stop_the_others(models: Models) -> None:
    with served(models.config()) as url:
        asking = Asking(url)
        before = asking.numbers("base", "generate"), asking.numbers("rm", "classify")
        with dying("other"):
            error = asking.refused(503, "/v1/rollouts", policy="other", prompts=[PROMPT], sampling=SAMPLING)
            assert "no memory left" in error["message"]
        health = asking.refused(503, "/health", "GET")["message"]
        assert health.startswith("The model other: ") and "no memory left" in health
        assert asking.http.get("/ready").status_code == 503
        assert (asking.numbers("base", "generate"), asking.numbers("rm", "classify")) == before
        rows = asking.rollouts("base", reward={"model": "rm", "as": "text"})
        assert all(row["reward"]["value"] is not None for row in rows)
        assert asking.http.post("/v1/release").status_code == 200
        metrics = asking.http.get("/metrics").text
        assert 'rollout_engine_state{model="other",state="dead"} 1.0' in metrics
        assert 'rollout_engine_state{model="base",state="ready"} 1.0' in metrics
        assert {"base", "other", "rm"} <= {card["id"] for card in asking.http.get("/v1/models").json()["data"]}


@pytest.mark.long
def test_each_keeps_its_versions_over_a_restart(models: Models, tmp_path: Path) -> None:
    given = tiny_models.save_adapter(tmp_path / "given", *adapter(models, 7))
    config = models.config(state_dir=tmp_path / "state", adapters=(("other/given", given),))
    base = tiny_models.linear_layers(models.base)
    with served(config) as url, RolloutClient(url) as client:
        first = client.push("p", *tiny_models.random_adapter(base, 4, 1))
        second = client.push("p", *adapter(models, 2), model="other")
        assert [line.name for line in client.weights("other")] == ["other/given", "other/p"]
        before = Asking(url).rollouts("p"), Asking(url).rollouts("other/p")
    assert (tmp_path / "state" / "models" / "other" / "policies").is_dir()
    with served(config) as url, RolloutClient(url) as client:
        assert [client.policy(name).versions[0].digest for name in ("p", "other/p")] == [first.digest, second.digest]
        for rows, policy in zip(before, ("p", "other/p"), strict=True):
            again = Asking(url).rollouts(policy)
            assert [(row["token_ids"], row["versions"]) for row in rows] == [
                (row["token_ids"], row["versions"]) for row in again
            ]
        assert client.health()
