"""Cohere's own client against `/v2/rerank`, as whoever ranks with it has it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import cohere
import httpx
import numpy as np
import pytest

from tests.support.golden_encoders import cross_encoder
from tests.support.live_server import LiveServer, live_server

KEY = "a-key-of-its-own"
QUERY = "who sat"
DOCUMENTS = ["the cat sat", "a dog", "he and the other one went on in the rain", "nobody"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    directory = cross_encoder(tmp_path_factory.mktemp("reranker"))
    with live_server(directory, environment={"ROLLOUT_API_KEY": KEY}) as live:
        yield live


@pytest.fixture(scope="module")
def client(server: LiveServer) -> cohere.ClientV2:
    return cohere.ClientV2(api_key=KEY, base_url=server.url)


def asked_plainly(server: LiveServer, **body: object) -> list[tuple[int, float]]:
    headers = {"authorization": f"Bearer {KEY}"}
    asked = {"model": "base", "query": QUERY, "documents": DOCUMENTS, **body}
    reply = httpx.post(f"{server.url}/rerank", json=asked, headers=headers).raise_for_status().json()
    return [(entry["index"], entry["relevance_score"]) for entry in reply["results"]]


def assert_same(found: cohere.V2RerankResponse, wanted: list[tuple[int, float]]) -> None:
    assert found.id and [entry.index for entry in found.results] == [index for index, _ in wanted]
    np.testing.assert_allclose([entry.relevance_score for entry in found.results], [score for _, score in wanted])


def test_documents_come_in_the_order_of_the_server(server: LiveServer, client: cohere.ClientV2) -> None:
    wanted = asked_plainly(server)
    assert len({score for _, score in wanted}) == len(DOCUMENTS)
    assert_same(client.rerank(model="base", query=QUERY, documents=DOCUMENTS), wanted)
    assert_same(client.rerank(model="base", query=QUERY, documents=DOCUMENTS, top_n=2), wanted[:2])

    async def beside() -> cohere.V2RerankResponse:
        async with cohere.AsyncClientV2(api_key=KEY, base_url=server.url) as other:
            return await other.rerank(model="base", query=QUERY, documents=DOCUMENTS)

    assert_same(asyncio.run(beside()), wanted)


def test_what_is_refused_is_an_error_of_its_client(server: LiveServer, client: cohere.ClientV2) -> None:
    with pytest.raises(cohere.NotFoundError, match="nobody"):
        client.rerank(model="nobody", query=QUERY, documents=DOCUMENTS)
    with pytest.raises(cohere.BadRequestError, match="query"):
        client.rerank(model="base", query="", documents=DOCUMENTS)
    with pytest.raises(cohere.BadRequestError, match="max_tokens_per_doc"):
        client.rerank(model="base", query=QUERY, documents=DOCUMENTS, max_tokens_per_doc=8)
    stranger = cohere.ClientV2(api_key="another", base_url=server.url)
    with pytest.raises(cohere.UnauthorizedError):
        stranger.rerank(model="base", query=QUERY, documents=DOCUMENTS)
