"""GRPO in which sampling and training overlap, beside the same loop with one after the other: which is there sooner?

    python examples/async_grpo.py     # beside `rollout-server serve`, in another terminal

A thread samples ahead of the trainer. An update takes rollouts that are at most `--staleness` versions old, which their
spans show, and truncated importance weights make up for what has changed since. 0 is the loop of `grpo_loop.py`. Each
loop runs by itself, and how right its versions are is found afterwards, off the clock. On a CPU give server and trainer
a part of the cores each (OPENBLAS_NUM_THREADS). `--plot FILE.png` draws the reward over the seconds (matplotlib).
"""
# ruff: noqa: E402

import argparse
import random
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import Any, NamedTuple

from rollout_server.machine.blas import load_fast_blas
from rollout_server.open_files import import_mlx_lm

load_fast_blas()  # before mlx is imported; it matters on a Linux CPU only
import_mlx_lm()  # which fails by itself where fewer than 4096 files may be open

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.tuner.utils import linear_to_lora_layers

from rollout_server.demo.trainer.evaluation import evaluate
from rollout_server.demo.trainer.task import Problem, held_out_problems, reward, training_problems
from trainer_client import RolloutBatch, RolloutClient

LORA = {"rank": 16, "scale": 2.0, "dropout": 0.0}
CAP = 2.0  # the largest importance weight


class Update(NamedTuple):
    """What it was made from, and the weights that it made."""

    seconds: float  # since the loop began, until the weights were live
    reward: float  # mean of the rollouts
    staleness: int  # by how many versions the oldest of their tokens was behind
    weights: dict[str, mx.array]


class Trainer:
    """The policy with LoRA layers, and its optimizer."""

    def __init__(self, seed: int) -> None:
        mx.random.seed(seed)
        self.model: Any = load(str(files("rollout_server") / "demo" / "model"))[0]
        self.model.set_dtype(mx.float32)
        self.model.freeze()
        linear_to_lora_layers(self.model, len(self.model.layers), LORA)
        self.config = {"fine_tune_type": "lora", "num_layers": len(self.model.layers), "lora_parameters": LORA}
        self._optimizer = optim.Adam(1e-3, betas=[0.9, 0.95], bias_correction=True)

    @property
    def weights(self) -> dict[str, mx.array]:
        return dict(tree_flatten(self.model.trainable_parameters()))

    def update(self, batch: RolloutBatch, rewards: list[float]) -> None:
        padded = batch.padded(prompt_padding="right")
        arrays = (padded["input_ids"], padded["loss_mask"], padded["logprobs"], batch.advantages(rewards))
        _, gradients = nn.value_and_grad(self.model, loss)(self.model, *map(mx.array, arrays))
        self._optimizer.update(self.model, gradients)
        mx.eval(self.model.trainable_parameters(), self._optimizer.state)


def loss(model: nn.Module, ids: mx.array, mask: mx.array, sampled: mx.array, advantages: mx.array) -> mx.array:
    """Policy gradient with truncated importance weights: of the trainer as it is now over what sampled the token."""
    logits = model(ids)[:, :-1]  # the logits at one token choose the next
    logprobs = mx.take_along_axis(logits, ids[:, 1:, None], -1)[..., 0] - mx.logsumexp(logits, -1)
    weights = mx.stop_gradient(mx.minimum(mx.exp(logprobs - sampled[:, 1:]), CAP))
    return -(weights * logprobs * advantages[:, None] * mask[:, 1:]).sum() / mask.sum()


def sample(client: RolloutClient, policy: str, problems: list[Problem], seed: int) -> tuple[list[float], RolloutBatch]:
    """Rollouts of whatever the policy's name means when they begin, and their rewards."""
    prompts = [problem.prompt for problem in problems]
    batch = client.rollouts(prompts, policy=policy, n=8, max_tokens=16, temperature=1.0, seed=seed)
    return [reward(problems[row.prompt_index], row.text or "", row.finish_reason == "stop") for row in batch], batch


def train(client: RolloutClient, policy: str, staleness: int, steps: int, prompts: int = 32) -> Iterator[Update]:
    """Yields every update. At most `staleness` batches lie ready or are being sampled while the trainer computes."""
    draw, trainer, problems = random.Random(0), Trainer(0), training_problems()
    began = time.perf_counter()
    version = client.push(policy, trainer.weights, trainer.config)
    with ThreadPoolExecutor(1) as sampler:

        def ahead() -> Any:
            return sampler.submit(sample, client, policy, draw.sample(problems, prompts), draw.getrandbits(48))

        batches = deque(ahead() for _ in range(1 + staleness))
        for step in range(steps):
            rewards, batch = batches.popleft().result()
            batch.assert_synced(version, max_staleness=staleness)
            behind = version.version - min(span.version or 0 for spans in batch.spans for span in spans)
            trainer.update(batch, rewards)
            version = client.push(policy, trainer.weights, trainer.config)
            if step + 1 + len(batches) < steps:
                batches.append(ahead())
            yield Update(time.perf_counter() - began, float(np.mean(rewards)), behind, trainer.weights)


def accuracies(client: RolloutClient, updates: list[Update]) -> Iterator[float]:
    """How many of 256 held-out problems each version answers rightly, greedily."""
    problems, config = held_out_problems(256, seed=0), Trainer(0).config
    for update in updates:
        yield evaluate(client, client.push("judged", update.weights, config), problems, 16).accuracy


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=32, help="of each step, eight rollouts each")
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1], help="the most of each loop")
    parser.add_argument("--accuracy", type=float, default=0.9, help="on held-out problems, to be reached")
    parser.add_argument("--plot")
    options = parser.parse_args()
    client, curves = RolloutClient(options.url), {}
    for most in options.staleness:
        curves[most] = updates = []
        for step, update in enumerate(train(client, f"stale-{most}", most, options.steps, options.prompts)):
            updates.append(update)
            said = f"{update.seconds:6.1f} s  reward {update.reward:.2f}  {update.staleness} behind"
            print(f"staleness {most}  step {step:2}  {said}", flush=True)
        judged = zip(updates, accuracies(client, updates), strict=True)
        reached = next((f"{u.seconds:.1f} s" for u, right in judged if right >= options.accuracy), "not in these steps")
        print(f"staleness {most}  accuracy {options.accuracy} reached: {reached}", flush=True)
    if options.plot:
        from matplotlib.figure import Figure

        axes = Figure().subplots(subplot_kw={"xlabel": "seconds", "ylabel": "mean reward"})
        for most, updates in curves.items():
            axes.plot([u.seconds for u in updates], [u.reward for u in updates], label=f"staleness ≤ {most}")
        axes.legend()
        axes.figure.savefig(options.plot)


if __name__ == "__main__":
    main()
