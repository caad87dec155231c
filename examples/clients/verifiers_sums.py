"""Environments of `verifiers`, played on this server: one turn for each sum, and three that go on from the answer.

    rollout-server serve                      # in one terminal: the embedded model
    python examples/clients/verifiers_sums.py # in another, where verifiers is installed

verifiers loads environments by the name of a module, here this one. Its programs usually run in a box of their own;
`Chat` is the smallest that does not: OpenAI's client, in this process. `--model NAME` plays any policy.
"""

from __future__ import annotations

import argparse
import asyncio
import re
from collections.abc import Iterator
from typing import Any

import verifiers.v1 as vf
from openai import AsyncOpenAI

from rollout_server.demo.trainer.task import Style, held_out_problems

__all__ = ["Chat", "Sums", "ThreeTurns"]

COUNT = 16


class Sum(vf.TaskData):
    total: int
    digits: str


class SumTask(vf.Task[Sum]):
    @vf.reward
    async def plain_digits(self, trace: vf.Trace) -> float:
        return float(trace.assistant_messages[0].content == self.data.digits)

    @vf.metric
    async def right(self, trace: vf.Trace) -> float:
        return float(str(self.data.total) in re.findall(r"\d+", trace.assistant_messages[0].content or ""))


class Sums(vf.Taskset[SumTask]):
    def load(self) -> Iterator[SumTask]:
        for problem in held_out_problems(COUNT, seed=0):
            data = Sum(prompt=problem.prompt, total=problem.total, digits=problem.answer(Style.DIGITS))
            yield SumTask(data, self.config.task)


class Chat(vf.Harness[vf.HarnessConfig]):
    """One reply for each turn of the user; verifiers stands between and records it."""

    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self,
        ctx: vf.ModelContext,
        trace: vf.Trace,
        runtime: vf.Runtime,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: vf.TaskData,
    ) -> vf.ProgramResult:
        _, prompt = self.resolve_prompt(data)
        spoken: list[Any] = [vf.UserMessage(content=prompt)] if isinstance(prompt, str) else list(prompt or ())
        messages: list[Any] = [{"role": message.role, "content": message.content} for message in spoken]
        async with AsyncOpenAI(base_url=endpoint, api_key=secret) as client:
            await client.chat.completions.create(model=ctx.model, messages=messages)
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")


class ThreeTurns(vf.Env[vf.SingleAgentEnvConfig]):
    """The user goes on from what was answered: a right answer plus one, then plus two."""

    async def run(self, task: vf.Task, agents: vf.Agents) -> None:
        async with agents.agent.interaction(task) as conversation:
            segment = await conversation.turn()
            for more in (1, 2):
                numbers = re.findall(r"\d+", segment.last_reply)
                segment = await conversation.turn(f"{int(numbers[-1]) % 100 if numbers else 0}+{more}=")


async def play(url: str, model: str, env: str) -> list[vf.Episode]:
    """Every sum once, under the environment with this id."""
    name = "verifiers_sums"
    config = vf.SingleAgentEnvConfig.model_validate(
        {"id": env, "taskset": {"id": name}, "agent": {"harness": {"id": name}, "runtime": {"type": "subprocess"}}}
    )
    context = vf.ModelContext(
        client=vf.EvalClientConfig(base_url=f"{url}/v1", api_key_var="ROLLOUT_API_KEY"),
        model=model,
        sampling=vf.SamplingConfig(temperature=0.0, max_tokens=16),
    )
    environment = vf.load_environment(config)
    async with environment.serving():
        slots = [slot for task in environment.taskset for slot in environment.slots(task)]
        return list(await asyncio.gather(*[environment.run_slot(slot, context) for slot in slots]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="base")
    options = parser.parse_args()
    for name, env in (("one turn", "single_agent"), ("three turns", "verifiers_sums")):
        episodes = asyncio.run(play(options.url, options.model, env))
        failed = [error for episode in episodes for error in episode.errors]
        failed += [error for episode in episodes for trace in episode.traces for error in trace.errors]
        if failed:
            raise SystemExit(f"{name}: {failed[0].message}")
        traces = [trace for episode in episodes for trace in episode.traces]
        reward = sum(trace.reward for trace in traces) / len(traces)
        right = sum(trace.metrics["right"] for trace in traces) / len(traces)
        turns = sum(trace.num_turns for trace in traces) / len(traces)
        print(f"{name}: {len(traces)} traces of {turns:.1f} turns, reward {reward:.2f}, right {right:.2f}", flush=True)


if __name__ == "__main__":
    main()
