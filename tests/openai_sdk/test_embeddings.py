"""OpenAI's SDK, which asks for base64 and decodes it, on `/v1/embeddings`."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.support.live_server import Server
from tests.support.numbers.bounds import EMBEDDED, assert_near

TEXTS = ["12+30=", "7+5=", "99+1="]


def test_the_sdk_embeds(client: OpenAI, tokenizer: Any) -> None:
    reply = client.embeddings.create(model="base", input=TEXTS)
    vectors = np.array([entry.embedding for entry in reply.data])
    assert vectors.shape[0] == 3 and [entry.index for entry in reply.data] == [0, 1, 2]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)
    ids = [tokenizer.encode(text) for text in TEXTS]
    assert reply.usage.prompt_tokens == sum(map(len, ids))
    floats = client.embeddings.create(model="org/demo", input=ids, encoding_format="float")
    np.testing.assert_allclose([entry.embedding for entry in floats.data], vectors, atol=1e-6)
    short = client.embeddings.create(model="base", input=TEXTS[0], dimensions=8, user="me").data[0].embedding
    np.testing.assert_allclose(short, vectors[0, :8] / np.linalg.norm(vectors[0, :8]), atol=1e-6)


def test_versions_embed_otherwise(client: OpenAI) -> None:
    found = {}
    for model in ("base", "policy", "policy@1"):
        raw = client.embeddings.with_raw_response.create(model=model, input=TEXTS[0])
        found[raw.headers["x-policy"]] = np.array(raw.parse().data[0].embedding)
    assert list(found) == ["base@0", "policy@2", "policy@1"]
    one, two, three = found.values()
    assert min(np.abs(one - two).max(), np.abs(one - three).max(), np.abs(two - three).max()) > 1e-3


def test_its_errors_have_their_classes(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.embeddings.create(model="nobody", input="a")
    assert (missing.value.code, missing.value.param) == ("unknown_policy", "model")
    with pytest.raises(openai.BadRequestError) as long:
        client.embeddings.create(model="base", input=[1] * 100_000)
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "input")


def test_many_at_once_are_as_each_alone(live: Server) -> None:
    async def main() -> list[Any]:
        async with AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
            texts = [f"{number}+{number}=" for number in range(40)]
            one = [(await client.embeddings.create(model="policy", input=text)).data[0].embedding for text in texts]
            calls = (client.embeddings.create(model="policy", input=text) for text in texts)
            return [one, [reply.data[0].embedding for reply in await asyncio.gather(*calls)]]

    one, together = map(np.array, asyncio.run(main()))
    # Texts of ten tokens at most; a vector has length one, and states are of order one before that.
    assert_near(together, one, EMBEDDED.of_logits(1.0, 10))
