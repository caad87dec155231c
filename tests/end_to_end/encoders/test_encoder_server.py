"""The whole way: encoders behind HTTP, with the numbers that transformers gives for the same files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

from rollout_server.engine.model.encoders.load import read_encoder
from rollout_server.engine.model.encoders.passages import Passage, tokenised
from rollout_server.engine.model.encoders.reading import read
from tests.support.golden_encoders import GOLDEN, copied, cross_encoder, with_template
from tests.support.live_server import Server, server_here, uncut
from tests.support.numbers.bounds import Network, assert_near
from tests.support.tiny_models import random_adapter
from trainer_client import RolloutClient

pytestmark = uncut("encoders")
NETWORK = Network(3, 24, 3)
TEXTS = ["the cat sat", "a dog", "he and the other one went on in the rain"]
QUERY = "who sat"
LONG = "the word " * 40
CONTEXT = 48
MODULES = (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))
PARTS = ("weight", "bias")


class Served:
    def __init__(self, server: Server, directory: Path) -> None:
        self.server, self.directory = server, directory
        self.http = httpx.Client(base_url=server.url, timeout=120)
        self.tokenizer = AutoTokenizer.from_pretrained(directory)

    def ask(self, path: str, **body: Any) -> Any:
        reply = self.http.post(path, json=body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def refused(self, path: str, status: int = 400, **body: Any) -> dict[str, Any]:
        reply = self.http.post(path, json=body)
        assert reply.status_code == status, reply.text
        error: dict[str, Any] = reply.json()["error"]
        return error

    def expected(self, *pairs: tuple[str, str | None]) -> list[np.ndarray]:
        """What the model gives for texts and pairs, each by itself, as the tokenizer spells them."""
        model = read_encoder(self.directory)
        types = model.limits.token_types
        return [
            read(model, [tokenised(self.tokenizer, one, other, token_types=types)], 1000)[0] for one, other in pairs
        ]


def served(directory: Path) -> Iterator[Served]:
    with server_here(directory) as server:
        yield Served(server, directory)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    names = {"0": "bad", "1": "fair", "2": "good"}
    place = copied("bert/classify", tmp_path_factory.mktemp("models") / "classifier", id2label=names)
    yield from served(with_template(place))


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from served(cross_encoder(tmp_path_factory.mktemp("models") / "reranker"))


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from served(copied("modernbert/token_classify", tmp_path_factory.mktemp("models") / "tagger"))


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    place = with_template(copied("distilbert/embed", tmp_path_factory.mktemp("models") / "embedder"))
    (place / "1_Pooling").mkdir()
    modules = [{"type": f"sentence_transformers.models.{name}", "path": path} for name, path in MODULES]
    (place / "modules.json").write_text(json.dumps(modules))
    (place / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": ["cls", "mean"]}))
    (place / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 32}))
    yield from served(place)


def softmax(values: np.ndarray) -> np.ndarray:
    raised = np.exp(values.astype(np.float64) - values.max())
    return np.asarray(raised / raised.sum())


# ---- classes ------------------------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_transformers(classifier: Served) -> None:
    """By ids of the golden file, which torch has read."""
    golden = load_file(GOLDEN / "bert" / "classify" / "reference.safetensors")
    ends = np.cumsum(golden["lengths"])[:-1]
    plain = [at for at, kinds in enumerate(np.split(golden["types"], ends)) if not kinds.any()]
    sequences = [np.split(golden["ids"], ends)[at].tolist() for at in plain]
    assert sequences
    reply = classifier.ask("/classify", input=sequences, use_activation=False)
    for entry, at in zip(reply["data"], plain, strict=True):
        values = golden["values"][at]
        assert_near(entry["probs"], values, NETWORK.of_logits(values, len(sequences[0])))


def test_texts_are_classified_by_name(classifier: Served) -> None:
    reply = classifier.ask("/v1/classify", model="base", input=TEXTS)
    wanted = classifier.expected(*((text, None) for text in TEXTS))
    for entry, values in zip(reply["data"], wanted, strict=True):
        assert_near(entry["probs"], softmax(values), NETWORK.of_logits(values, CONTEXT))
        assert entry["label"] == ("bad", "fair", "good")[int(np.argmax(values))] and entry["num_classes"] == 3
    assert reply["usage"]["prompt_tokens"] == sum(len(classifier.tokenizer(text)["input_ids"]) for text in TEXTS)
    pooled = classifier.ask("/pooling", input=TEXTS)["data"]
    assert [entry["data"] for entry in pooled] == [entry["probs"] for entry in reply["data"]]
    rewards = classifier.ask("/v1/rewards", sequences=[{"text": text} for text in TEXTS])
    for entry, values in zip(rewards["rewards"], wanted, strict=True):
        assert entry["value"] is None
        assert_near(entry["scores"], values, NETWORK.of_logits(values, CONTEXT))
    assert rewards["labels"] == ["bad", "fair", "good"]


def test_the_list_of_models_says_what_it_is_for(classifier: Served, embedder: Served) -> None:
    for served, task, labels, longest in (
        (classifier, "classify", ["bad", "fair", "good"], CONTEXT),
        (embedder, "embed", [], 32),
    ):
        cards = served.http.get("/v1/models").json()["data"]
        found = [(card["task"], card["labels"], card["max_model_len"]) for card in cards]
        assert {card["id"] for card in cards} == {"base", served.directory.name}
        assert found == [(task, labels, longest)] * 2


def test_it_says_how_it_is(classifier: Served) -> None:
    assert classifier.http.get("/health").json()["state"] == "ready"
    assert classifier.http.get("/ready").status_code == 200
    metrics = classifier.http.get("/metrics").text
    assert 'rollout_engine_state{model="base",state="ready"} 1.0' in metrics
    assert 'rollout_memory_bytes{model="base",part="weights"}' in metrics


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/completions", {"prompt": "hi", "structured_outputs": {"regex": "a+"}}),
        ("/v1/score", {"query": "a", "items": ["b"], "label_token_ids": [5]}),
    ],
)
def test_what_samples_is_refused_by_name(classifier: Served, path: str, body: dict[str, Any]) -> None:
    error = classifier.refused(path, model="base", **body)
    assert error["param"] == "model" and "classify" in error["message"] and "samples nothing" in error["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/rollouts", {"prompts": [{"token_ids": [5]}], "sampling": {"max_tokens": 2}}),
        ("/v1/logprobs", {"sequences": [{"token_ids": [5, 6]}]}),
    ],
)
def test_what_a_trainer_samples_is_refused_by_name(classifier: Served, path: str, body: dict[str, Any]) -> None:
    error = classifier.refused(path, policy="base", **body)
    assert error["param"] == "policy" and "samples nothing" in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/classify", {"input": LONG}, "input"),
        ("/classify", {"input": ["a", LONG]}, "input[1]"),
        ("/classify", {"input": [[5], [5] * (CONTEXT + 1)]}, "input[1]"),
        ("/classify", {"input": [[5, 320]]}, "input[0][1]"),
        ("/classify", {"input": [[]]}, "input[0]"),
        ("/classify", {"input": LONG, "truncate_prompt_tokens": 2}, "truncate_prompt_tokens"),
        ("/classify", {"input": LONG, "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ("/classify", {"input": LONG, "truncate_prompt_tokens": CONTEXT + 1}, "input"),
        ("/pooling", {"input": "a", "task": "embed"}, "model"),
        ("/pooling", {"input": "a", "task": "token_classify"}, "model"),
        ("/v1/rewards", {"sequences": [{"text": "the cat"}], "steps": {"positions": [[0]]}}, "steps"),
        ("/v1/rewards", {"sequences": [{"text": LONG}]}, "sequences[0].text"),
        ("/v1/embeddings", {"model": "base", "input": "a"}, "model"),
        ("/score", {"queries": "a", "documents": ["b"]}, "model"),
        ("/rerank", {"query": "a", "documents": ["b"]}, "model"),
        ("/get_reward", {"query": ["a"]}, "model"),
    ],
    ids=str,
)
def test_bad_input_is_named(classifier: Served, path: str, body: dict[str, Any], param: str) -> None:
    error = classifier.refused(path, **body)
    assert error["param"].removesuffix(".text") == param.removesuffix(".text"), error


def test_what_is_cut_keeps_its_special_tokens(classifier: Served) -> None:
    """The first one is what BERT's head reads."""
    whole = classifier.tokenizer(LONG)["input_ids"]
    for keep, tokens in ((7, 7), (-1, CONTEXT)):
        cut = [whole[0], *whole[-(tokens - 1) :]]
        found = classifier.ask("/classify", input=LONG, truncate_prompt_tokens=keep)
        ids = classifier.ask("/classify", input=[cut])
        assert found["usage"]["prompt_tokens"] == tokens
        assert_near(found["data"][0]["probs"], ids["data"][0]["probs"], 1e-6)
    literal = classifier.ask("/classify", input=[whole], truncate_prompt_tokens=7)
    assert_near(literal["data"][0]["probs"], classifier.ask("/classify", input=[whole[-7:]])["data"][0]["probs"], 1e-6)


# ---- pairs --------------------------------------------------------------------------------------------------------


def test_pairs_are_read_with_their_token_types(reranker: Served) -> None:
    wanted = reranker.expected(*((QUERY, text) for text in TEXTS))
    raw = reranker.ask("/score", text_1=QUERY, text_2=TEXTS, use_activation=False)["data"]
    for entry, values in zip(raw, wanted, strict=True):
        assert_near([entry["score"]], values, NETWORK.of_logits(values, CONTEXT))
    model = read_encoder(reranker.directory)
    untyped = [
        read(model, [Passage(tuple(reranker.tokenizer(QUERY, text)["input_ids"]))], 1000)[0][0] for text in TEXTS
    ]
    assert np.abs(np.array(untyped) - [entry["score"] for entry in raw]).max() > 0.01, "types decide"
    scores = [1 / (1 + np.exp(-float(values[0]))) for values in wanted]
    results = reranker.ask("/rerank", query=QUERY, documents=TEXTS)["results"]
    assert [entry["index"] for entry in results] == sorted(range(3), key=lambda at: -scores[at])
    for entry in results:
        bound = NETWORK.of_logits(wanted[entry["index"]], CONTEXT)
        assert_near([entry["relevance_score"]], [scores[entry["index"]]], bound)
    assert reranker.ask("/get_reward", query=[TEXTS[0]])["rewards"] == [
        pytest.approx(float(reranker.expected((TEXTS[0], None))[0][0]), abs=1e-5)
    ]


def test_a_pair_that_is_too_long_is_refused_or_cut_in_the_longer_text(reranker: Served) -> None:
    error = reranker.refused("/rerank", query=QUERY, documents=["a", LONG])
    assert error["param"] == "documents[1]" and error["code"] == "context_length_exceeded"
    found = reranker.tokenizer(QUERY, LONG)
    beginning = len(reranker.tokenizer(QUERY)["input_ids"])
    keep = 20
    ids = (*found["input_ids"][:beginning], *found["input_ids"][-(keep - beginning) :])
    types = (*found["token_type_ids"][:beginning], *found["token_type_ids"][-(keep - beginning) :])
    (values,) = read(read_encoder(reranker.directory), [Passage(ids, types)], 1000)
    body = {"text_1": QUERY, "text_2": [LONG], "truncate_prompt_tokens": keep, "use_activation": False}
    assert_near([reranker.ask("/score", **body)["data"][0]["score"]], values, NETWORK.of_logits(values, CONTEXT))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"query": "", "documents": ["a"]}, "query"),
        ({"query": "a", "documents": []}, "documents"),
        ({"query": "a", "documents": ["b"] * 10_000}, "documents"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_documents(reranker: Served, body: dict[str, Any], param: str) -> None:
    assert reranker.refused("/rerank", **body)["param"] == param


# ---- tokens -------------------------------------------------------------------------------------------------------


def test_every_token_or_those_of_steps(tagger: Served) -> None:
    (values,) = tagger.expected((TEXTS[2], None))
    every = tagger.ask("/pooling", input=TEXTS[2], use_activation=False)["data"][0]["data"]
    assert_near(every, values, NETWORK.of_logits(values, CONTEXT))
    some = tagger.ask("/v1/rewards", sequences=[{"text": TEXTS[2]}], steps={"positions": [[1, 4]]})["rewards"][0]
    assert some["scores"] is None
    assert_near(some["steps"], values[[1, 4]], NETWORK.of_logits(values, CONTEXT))
    assert tagger.refused("/classify", input="a")["param"] == "model"
    assert tagger.refused("/score", queries="a", documents="b")["param"] == "model"


# ---- vectors ------------------------------------------------------------------------------------------------------


def unit(vectors: list[np.ndarray]) -> np.ndarray:
    stacked = np.stack(vectors).astype(np.float64)
    return np.asarray(stacked / np.linalg.norm(stacked, axis=1, keepdims=True))


def test_vectors_are_pooled_as_the_files_say(embedder: Served) -> None:
    wanted = unit(embedder.expected(*((text, None) for text in TEXTS)))
    reply = embedder.ask("/v1/embeddings", model="base", input=TEXTS)
    vectors = np.array([entry["embedding"] for entry in reply["data"]])
    assert vectors.shape == (3, 32)
    assert_near(vectors, wanted, NETWORK.of_logits(wanted, CONTEXT))
    pooled = embedder.ask("/pooling", input=TEXTS)["data"]
    assert_near([entry["data"] for entry in pooled], wanted, NETWORK.of_logits(wanted, CONTEXT))
    short = embedder.ask("/v1/embeddings", model="base", input=TEXTS, dimensions=8)
    assert_near(
        [entry["embedding"] for entry in short["data"]], unit(list(wanted[:, :8])), NETWORK.of_logits(wanted, CONTEXT)
    )


def test_pairs_are_scored_by_the_angle(embedder: Served) -> None:
    one, *others = unit(embedder.expected(*((text, None) for text in (QUERY, *TEXTS))))
    scores = [entry["score"] for entry in embedder.ask("/score", queries=QUERY, documents=TEXTS)["data"]]
    assert_near(scores, [one @ other for other in others], 1e-5)
    results = embedder.ask("/rerank", query=QUERY, documents=TEXTS, top_n=1)["results"]
    assert [entry["index"] for entry in results] == [int(np.argmax(scores))]


def test_a_text_beyond_what_the_files_say_is_refused_or_cut(embedder: Served) -> None:
    error = embedder.refused("/v1/embeddings", model="base", input=["a", LONG])
    assert error["param"] == "input[1]" and error["code"] == "context_length_exceeded"
    reply = embedder.ask("/v1/embeddings", model="base", input=LONG, truncate_prompt_tokens=-1)
    assert reply["usage"]["prompt_tokens"] == 32
    assert embedder.refused("/classify", input="a", model="base")["param"] == "model"
    assert "/v1/embeddings" in embedder.refused("/v1/completions", model="base", prompt="a")["message"]


# ---- versions -----------------------------------------------------------------------------------------------------


def test_a_version_is_pushed_asked_and_deleted(classifier: Served, tmp_path: Path) -> None:
    """As PEFT saves it for SEQ_CLS, with the classifier that it trained beside its adapter."""
    model = read_encoder(classifier.directory)
    targets = {path: shape for path, shape in model.layers.items() if path.endswith((".query", ".value"))}
    tensors, config = random_adapter(targets, 3, 1)
    head = load_file(classifier.directory / "model.safetensors")
    swapped = {f"base_model.model.classifier.{part}": head[f"classifier.{part}"][::-1].copy() for part in PARTS}
    save_file({**tensors, **swapped}, tmp_path / "adapter_model.safetensors")
    config |= {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    before = classifier.ask("/classify", model="base", input=TEXTS)
    with RolloutClient(classifier.server.url) as client:
        version = client.push("rm", tmp_path)
    reply = classifier.http.post("/classify", json={"model": "rm", "input": TEXTS})
    assert reply.headers["x-policy"] == f"rm@{version.version}"
    own = np.array([entry["probs"] for entry in reply.json()["data"]])
    assert np.abs(own - [entry["probs"] for entry in before["data"]]).max() > 0.01
    cards = {card["id"]: card["task"] for card in classifier.http.get("/v1/models").json()["data"]}
    assert cards["rm"] == cards[f"rm@{version.version}"] == "classify"
    assert classifier.ask("/classify", model="base", input=TEXTS)["data"] == before["data"]
    assert classifier.refused("/v1/completions", model="rm", prompt="a")["param"] == "model"
    assert classifier.http.delete("/v1/weights/rm").status_code == 200
    classifier.refused("/classify", 404, model="rm", input=TEXTS)
