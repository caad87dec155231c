"""litellm on this server: whole, streamed and asynchronous chat, and completions with log-probabilities.

    rollout-server serve                      # in one terminal: the embedded model
    python examples/clients/litellm_calls.py  # in another, where litellm is installed

`openai/` before a policy's name says which API it is; `hosted_vllm/` works as well. LITELLM_LOCAL_MODEL_COST_MAP=True
keeps litellm from looking for prices elsewhere.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import litellm


def asked(question: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}], "temperature": 0.0, "max_tokens": 16}


def streamed(where: dict[str, Any], question: str) -> tuple[str, int]:
    """The text of the parts, and the number of tokens that the last part reports."""
    stream = litellm.completion(**where, **asked(question), stream=True, stream_options={"include_usage": True})
    text, tokens = "", 0
    for part in stream:
        text += "".join(choice.delta.content or "" for choice in part.choices)
        tokens = part.usage.completion_tokens if getattr(part, "usage", None) else tokens
    return text, tokens


async def together(where: dict[str, Any], questions: list[str]) -> list[str]:
    replies = await asyncio.gather(*[litellm.acompletion(**where, **asked(question)) for question in questions])
    return [reply.choices[0].message.content for reply in replies]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--policy", default="base")
    options = parser.parse_args()
    where = {"model": f"openai/{options.policy}", "api_base": f"{options.url}/v1", "api_key": "none"}

    reply = litellm.completion(**where, **asked("17+25="), logprobs=True, top_logprobs=2)
    (choice,) = reply.choices
    print(f"whole: {choice.message.content!r}, {reply.usage.completion_tokens} tokens")
    print("first token: {0.token!r} at {0.logprob:.3f}".format(choice.logprobs.content[0]))
    print("streamed: {!r}, {} tokens".format(*streamed(where, "17+25=")))
    for answer in asyncio.run(together(where, [f"{number}+25=" for number in range(10, 14)])):
        print(f"together: {answer!r}")

    where["model"] = f"text-completion-openai/{options.policy}"
    texts = litellm.text_completion(**where, prompt=["17+25=", "4+4="], max_tokens=16, temperature=0.0, logprobs=1)
    for choice in texts.choices:
        print(f"completion: {choice.text!r}, {sum(choice.logprobs.token_logprobs):.3f}")
    try:
        litellm.completion(**where | {"model": "openai/nobody"}, **asked("-"))
    except litellm.exceptions.NotFoundError as error:
        print(f"not found: {error.message.splitlines()[0]}")


if __name__ == "__main__":
    main()
