"""Streams of 500 random Unicode prompts add up to the text without a stream, and no character is broken on the way."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from openai import AsyncOpenAI

from tests.openai_sdk.routes import Answer, arguments, resource, streamed, whole
from tests.support.live_server import Server

ALPHABETS = ("abc 0123+=\n", "äéïøß", "你好世界", "😀👩‍🚀🏳️‍🌈", "नमस्ते", "שלום", "e\u0301\u200d\u00ad\ufffd")
BATCH = 25


def prompts(count: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    pools = (*ALPHABETS, "".join(ALPHABETS))
    return ["".join(generator.choices(generator.choice(pools), k=generator.randrange(1, 16))) for _ in range(count)]


def check(answers: list[Answer], expected: list[Answer], tokenizer: Any) -> int:
    """Returns how many texts hold a character of several bytes."""
    for got, wanted in zip(answers, expected, strict=True):
        assert (got.text, got.ids) == (wanted.text, wanted.ids)
        assert got.text == tokenizer.decode(got.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return sum(not answer.text.isascii() for answer in answers)


@pytest.mark.parametrize(
    ("route", "count", "fields", "broad"),
    [
        pytest.param("completions", 300, {"temperature": 0}, False, marks=pytest.mark.long),
        # Nearly uniform over the vocabulary: broken characters, whole ones, and such that go on in the next token.
        ("completions", 40, {"temperature": 20.0}, True),
        pytest.param("completions", 100, {"temperature": 20.0}, True, marks=pytest.mark.long),
        pytest.param("chat", 100, {"temperature": 20.0}, True, marks=pytest.mark.long),
    ],
    ids=["greedy", "some bytes", "bytes", "chat"],
)
def test_500_prompts(live: Server, tokenizer: Any, route: str, count: int, fields: dict[str, Any], broad: bool) -> None:
    texts = prompts(count, seed=count)
    groups: list[Any] = texts if route == "chat" else [texts[at : at + BATCH] for at in range(0, count, BATCH)]

    async def both(client: AsyncOpenAI, group: Any) -> int:
        asked = arguments(route, group, max_tokens=4, **fields, extra_body={"return_token_ids": True})
        reply, stream = await asyncio.gather(
            resource(client, route).create(**asked), resource(client, route).create(**asked, stream=True)
        )
        expected = whole(route, reply)
        answers, _ = streamed(route, [event async for event in stream], len(expected))
        return check(answers, expected, tokenizer)

    async def run() -> list[int]:
        async with AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
            return await asyncio.gather(*[both(client, group) for group in groups])

    many = sum(asyncio.run(run()))
    assert many > count // 4 or not broad
