"""An alarm for a trainer that is not where it thinks it is: `probe` at every step, before anything is learned from it.

    rollout-server serve                                          # in one terminal
    python examples/watch_mismatch.py                             # in another: trains, and the alarm keeps quiet
    python examples/watch_mismatch.py --behind-from 3             # from step 3 on the trainer has old weights

What falls behind here is the copy of the policy with which the trainer computes its log-probabilities, as the worker of
a larger trainer may. The loss would go on falling for a while. The probe compares those log-probabilities with the
server's at the same tokens; where they differ, the versions that the server keeps are read one by one, and the one that
agrees says how far behind the trainer is.
"""
# ruff: noqa: E402

import argparse
import random
import sys
from importlib.resources import files
from typing import Any

from rollout_server.machine.blas import load_fast_blas
from rollout_server.open_files import import_mlx_lm

load_fast_blas()  # before mlx is imported; it matters on a Linux CPU only
import_mlx_lm()  # which fails by itself where fewer than 4096 files may be open

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm import load
from mlx_lm.tuner.utils import linear_to_lora_layers

from trainer_client import RolloutBatch, RolloutClient

LORA = {"rank": 16, "scale": 2.0, "dropout": 0.0}
LIMIT = 1e-3
"""Nats at one token. Float32 on both sides stays below 1e-4; in bfloat16 some hundredths are rounding."""


def alarm(client: RolloutClient, batch: RolloutBatch, trainer_logprobs: np.ndarray, limit: float) -> str | None:
    """What is wrong, in a sentence, or None where trainer and server agree. The batch is of one version."""
    (found,) = client.probe(batch, trainer_logprobs)
    worst = found.rescored.max_abs_difference
    if worst is not None and worst <= limit:
        return None
    name, number = found.version.name, found.version.version
    told = f"{name}@{number} sampled these rows, but the trainer differs by {worst} nats (kl {found.rescored.kl})"
    for kept in sorted(client.policy(name).versions, key=lambda kept: -kept.version):
        read = client.logprobs(batch, policy=f"{name}@{kept.version}").logprobs
        if np.abs(read - trainer_logprobs)[batch.loss_mask == 1].max() <= limit:
            return f"{told}: it has the weights of {name}@{kept.version}, {number - kept.version} version(s) behind."
    return f"{told}, and it agrees with no version that is kept: are model, tokens, temperature and mask the same?"


def with_lora() -> Any:
    model = load(str(files("rollout_server") / "demo" / "model"))[0]
    model.set_dtype(mx.float32)
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), LORA)
    return model


def logprobs(model: nn.Module, ids: mx.array) -> mx.array:
    logits = model(ids)[:, :-1]  # the logits at one token choose the next
    return mx.take_along_axis(logits, ids[:, 1:, None], -1)[..., 0] - mx.logsumexp(logits, -1)


def loss(model: nn.Module, ids: mx.array, mask: mx.array, sampled: mx.array, advantages: mx.array) -> mx.array:
    ratio = mx.exp(logprobs(model, ids) - sampled[:, 1:])
    return -(ratio * advantages[:, None] * mask[:, 1:]).sum() / mask.sum()


parser = argparse.ArgumentParser()
parser.add_argument("--url", default="http://127.0.0.1:8000")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--prompts", type=int, default=32)
parser.add_argument("--behind-from", type=int, help="the step from which on the copy gets its weights one step late")
options = parser.parse_args()
client = RolloutClient(options.url)
policy, copy, optimizer = with_lora(), with_lora(), optim.Adam(1e-3, betas=[0.9, 0.95], bias_correction=True)
config = {"fine_tune_type": "lora", "num_layers": len(policy.layers), "lora_parameters": LORA}
late = dict(tree_flatten(policy.trainable_parameters()))
for step in range(options.steps):
    weights = dict(tree_flatten(policy.trainable_parameters()))
    version = client.push("watched", weights, config)
    behind = options.behind_from is not None and step >= options.behind_from
    copy.update(tree_unflatten(list((late if behind else weights).items())))
    late = weights
    problems = [(random.randrange(100), random.randrange(100)) for _ in range(options.prompts)]
    batch = client.rollouts([f"{a}+{b}=" for a, b in problems], policy=version, n=8, max_tokens=16, temperature=1.0)
    padded = batch.padded(prompt_padding="right")
    mask = padded["completion_mask"][:, 1:] == 1  # row by row, the order of the batch's flat arrays
    trainer_logprobs = np.array(logprobs(copy, mx.array(padded["input_ids"])))[mask]
    if said := alarm(client, batch, trainer_logprobs, LIMIT):
        sys.exit(f"step {step}: {said}")
    rewards = [float(row.finish_reason == "stop" and row.text == str(sum(problems[row.prompt_index]))) for row in batch]
    arrays = (padded["input_ids"], padded["loss_mask"], padded["logprobs"], batch.advantages(rewards))
    _, gradients = nn.value_and_grad(policy, loss)(policy, *map(mx.array, arrays))
    optimizer.update(policy, gradients)
    mx.eval(policy.trainable_parameters(), optimizer.state)
    print(
        f"step {step:2}  watched@{version.version}  reward {np.mean(rewards):.2f}  trainer and server agree", flush=True
    )
