"""A conversation of three turns by token ids: what the model wrote is never tokenised again, and tool text is masked.

    rollout-server serve                      # in one terminal: the embedded model
    python examples/tool_conversation.py      # in another; needs trainer_client only

Each turn sends the turns before as a `prefix`: the ids as they were sampled, with log-probabilities and versions, and
then the ids of the tool's message. The server goes on from there, out of the KV it kept, and returns one row for the
whole conversation: `loss_mask` is 1 where the policy wrote and 0 where the tool did.
"""

from __future__ import annotations

import argparse
import re

import httpx

from trainer_client import Rollout, RolloutClient, continued

TURNS = 3
TURN_TOKENS = 16


def rendered(url: str, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> list[int]:
    """Ids of messages as the chat template writes them."""
    body = {"messages": messages, "add_generation_prompt": add_generation_prompt}
    ids: list[int] = httpx.post(f"{url}/tokenize", json=body).raise_for_status().json()["tokens"]
    return ids


def tool_ids(url: str, content: str, end: int) -> list[int]:
    """What stands between the token that ended the model's turn and its next one: whatever the template puts there, and
    the tool's message. It does not depend on what was said before, so that two short messages stand for it."""
    before = [{"role": "user", "content": "-"}, {"role": "assistant", "content": "-"}]
    said = rendered(url, before, add_generation_prompt=False)
    whole = rendered(url, [*before, {"role": "tool", "content": content}], add_generation_prompt=True)
    if whole[: len(said)] != said:
        raise SystemExit("This chat template rewrites earlier turns: build the ids of its turns yourself.")
    return whole[len(said) - said[::-1].index(end) :]


def next_sum(row: Rollout, turn: int) -> str:
    """The tool: it gives the model another sum, from the last number of its answer."""
    numbers = re.findall(r"\d+", row.text or "")
    return f"{int(numbers[-1]) % 100 if numbers else 0}+{turn}="


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    options = parser.parse_args()
    # A model that was taught to call tools has them beside: {"messages": …, "tools": [{"type": "function", …}]}.
    question = {"messages": [{"role": "user", "content": "17+25="}]}
    with RolloutClient(options.url) as client:
        (end,) = client.models()[0].eos_token_ids
        running = list(client.rollouts([question], n=4, max_tokens=TURN_TOKENS, seed=1))
        ended: list[Rollout] = []
        for turn in range(1, TURNS):
            ended += [row for row in running if row.finish_reason != "stop"]  # no end token: nothing can be answered
            prompts = []
            for row in running:
                if row.finish_reason == "stop":
                    ids = tool_ids(options.url, next_sum(row, turn), end)
                    prompts.append(continued(row, ids, max_tokens=len(row.token_ids) + len(ids) + TURN_TOKENS))
            running = list(client.rollouts(prompts, seed=1)) if prompts else []
    for row in ended + running:
        sampled = int(row.loss_mask.sum())
        print(f"{row.finish_reason}: {sampled} of {len(row.token_ids)} tokens are the policy's: {row.text!r}")


if __name__ == "__main__":
    main()
