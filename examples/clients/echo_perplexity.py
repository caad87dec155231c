"""The perplexity of a text by OpenAI's completions route alone: the prompt echoed with its log-probabilities.

python examples/clients/echo_perplexity.py README.md policy
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import httpx

SERVER = "http://127.0.0.1:8000"


def main(file: str, model: str = "base") -> None:
    asked = {"model": model, "prompt": Path(file).read_text(encoding="utf-8")}
    # Nothing is sampled: the text comes back with a value for every token, and must fit the model's context.
    asked |= {"max_tokens": 0, "echo": True, "logprobs": 0}
    reply = httpx.post(f"{SERVER}/v1/completions", json=asked, timeout=None)
    reply.raise_for_status()
    first, *values = reply.json()["choices"][0]["logprobs"]["token_logprobs"]
    if first is not None:
        raise RuntimeError("The first token has nothing before it, so it has no value.")
    print(f"{reply.headers['x-policy']}: perplexity {math.exp(-sum(values) / len(values)):.4f}")


main(*sys.argv[1:])
