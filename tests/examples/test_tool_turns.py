"""A tool conversation of three turns by token ids, on the embedded model over real HTTP."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from transformers import AutoTokenizer

import rollout_server.demo
from examples.tool_conversation import tool_ids
from tests.examples.as_written import run_example
from tests.support import tiny_models
from tests.support.live_server import Server
from tests.support.numbers.bounds import EMBEDDED
from trainer_client import RolloutClient, continued

DEMO = Path(rollout_server.demo.__file__).parent / "model"
QUESTION = [{"role": "user", "content": "17+25="}]
TOOL = ("42+1=", "30+2=")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


def test_every_turn_begins_with_the_exact_ids_of_the_turns_before(live: Server, tokenizer: Any) -> None:
    """Sampled warm, so that what was written is often not how the tokenizer would write it; a version for each turn."""
    layers = tiny_models.linear_layers(DEMO)
    drifted = False
    with RolloutClient(live.url) as client:
        version = client.push("tools", *tiny_models.random_adapter(layers, 4, 0, strength=0.1))
        rows = list(
            client.rollouts([{"messages": QUESTION}], policy=version, n=6, max_tokens=8, seed=3, temperature=1.5)
        )
        for turn, words in enumerate(TOOL, start=1):
            version = client.push("tools", *tiny_models.random_adapter(layers, 4, turn, strength=0.1))
            tool = tool_ids(live.url, words, tokenizer.eos_token_id)
            longer = [continued(row, tool, max_tokens=len(row.token_ids) + len(tool) + 8) for row in rows]
            after = list(client.rollouts(longer, policy=version, temperature=1.5))
            for row, before in zip(after, rows, strict=True):
                count, given = len(before.token_ids), len(before.token_ids) + len(tool)
                assert np.array_equal(row.prompt_token_ids, before.prompt_token_ids)
                assert row.token_ids[:given].tolist() == [*before.token_ids.tolist(), *tool]
                expected = [*before.loss_mask.tolist(), *[0] * len(tool), *[1] * (len(row.token_ids) - given)]
                assert row.loss_mask.tolist() == expected and len(row.token_ids) > given
                assert np.array_equal(row.logprobs[:count], before.logprobs, equal_nan=True)
                assert np.isnan(row.logprobs[count:given]).all() and not np.isnan(row.logprobs[given:]).any()
                assert [span.version for span in row.spans] == list(range(1, turn + 2))
                assert [span.start for span in row.spans][1:] == [span.end for span in row.spans][:-1]
            rows = after
            scored = client.logprobs([[*row.prompt_token_ids, *row.token_ids] for row in rows], policy=version)
            for row, every in zip(rows, np.split(scored.logprobs, scored.offsets[1:-1]), strict=True):
                (span,) = [span for span in row.spans if span.version == version.version]
                gaps = (every[len(row.prompt_token_ids) :] - row.logprobs)[span.start : span.end]
                assert len(gaps) and np.abs(gaps).max() <= EMBEDDED.of_logprobs(every, len(every))
    for row in rows:
        text = tokenizer.decode(row.token_ids, clean_up_tokenization_spaces=False)
        drifted |= tokenizer.encode(text, add_special_tokens=False) != row.token_ids.tolist()
    assert drifted


def test_chat_and_rollouts_read_what_transformers_renders(live: Server, tokenizer: Any) -> None:
    """Greedy answers are written as the tokenizer writes them: there the messages of a conversation, rendered anew at
    each turn, are the very ids of the turns before."""
    messages: list[dict[str, str]] = list(QUESTION)
    known: list[int] = []
    with RolloutClient(live.url) as client:
        for words in (*TOOL, None):
            expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            assert expected[: len(known)] == known
            fields: Any = {"temperature": 0, "max_tokens": 24}
            body = {"model": "base", "messages": messages, "return_token_ids": True, **fields}
            chat = httpx.post(f"{live.url}/v1/chat/completions", json=body).json()
            (row,) = client.rollouts([{"messages": messages}], **fields)
            choice = chat["choices"][0]
            assert chat["prompt_token_ids"] == row.prompt_token_ids.tolist() == expected
            assert choice["token_ids"] == row.token_ids.tolist() and choice["finish_reason"] == "stop"
            known = expected + choice["token_ids"]
            if words is not None:
                answer = {"role": "assistant", "content": choice["message"]["content"]}
                messages += [answer, {"role": "tool", "content": words}]
                known += tool_ids(live.url, words, tokenizer.eos_token_id)


@pytest.mark.long
def test_the_example_runs_as_written(live: Server) -> None:
    ran = run_example("examples/tool_conversation.py", "--url", live.url, timeout_s=100)
    assert ran.returncode == 0, ran.stderr
    counts = re.findall(r"^(?:stop|length): (\d+) of (\d+) tokens", ran.stdout, flags=re.MULTILINE)
    assert len(counts) == 4 and all(0 < int(sampled) <= int(tokens) for sampled, tokens in counts)
    assert any(int(sampled) < int(tokens) for sampled, tokens in counts)
