"""GRPO in one page. In one terminal `rollout-server serve`, in another `python examples/grpo_loop.py`.

The embedded model can add, but writes its answers in several styles. Only plain digits are rewarded here, and the
reward rises from 0.3 to above 0.9 in about a minute. For a model of your own: `rollout-server serve --model DIR`, then
`python examples/grpo_loop.py DIR`, with your prompts and your reward.
"""
# ruff: noqa: E402

from __future__ import annotations

import random
import sys
from importlib.resources import files

from rollout_server.machine.blas import load_fast_blas
from rollout_server.open_files import import_mlx_lm

load_fast_blas()  # before mlx is imported; it matters on a Linux CPU only
import_mlx_lm()  # which fails by itself where fewer than 4096 files may be open

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.tuner.utils import linear_to_lora_layers

from trainer_client import RolloutClient

model = load(sys.argv[1] if sys.argv[1:] else str(files("rollout_server") / "demo" / "model"))[0]
model.set_dtype(mx.float32)
model.freeze()
lora = {"rank": 16, "scale": 2.0, "dropout": 0.0}
linear_to_lora_layers(model, len(model.layers), lora)
config = {"fine_tune_type": "lora", "num_layers": len(model.layers), "lora_parameters": lora}
optimizer = optim.Adam(1e-3, betas=[0.9, 0.95], bias_correction=True)


def loss(model: nn.Module, ids: mx.array, mask: mx.array, sampled: mx.array, advantages: mx.array) -> mx.array:
    logits = model(ids)[:, :-1]  # the logits at one token choose the next
    logprobs = mx.take_along_axis(logits, ids[:, 1:, None], -1)[..., 0] - mx.logsumexp(logits, -1)
    ratio = mx.exp(logprobs - sampled[:, 1:])
    return -(ratio * advantages[:, None] * mask[:, 1:]).sum() / mask.sum()


client = RolloutClient("http://127.0.0.1:8000")
for step in range(30):
    tensors = dict(tree_flatten(model.trainable_parameters()))
    version = client.push("policy", tensors, config, label=f"step-{step}")
    problems = [(random.randrange(100), random.randrange(100)) for _ in range(32)]
    batch = client.rollouts([f"{a}+{b}=" for a, b in problems], policy="policy", n=8, max_tokens=16, temperature=1.0)
    batch.assert_synced(version)
    rewards = [float(row.finish_reason == "stop" and row.text == str(sum(problems[row.prompt_index]))) for row in batch]
    padded = batch.padded(prompt_padding="right")
    arrays = (padded["input_ids"], padded["loss_mask"], padded["logprobs"], batch.advantages(rewards))
    _, gradients = nn.value_and_grad(model, loss)(model, *map(mx.array, arrays))
    optimizer.update(model, gradients)
    mx.eval(model.trainable_parameters(), optimizer.state)
    print(f"step {step:2}  policy@{version.version}  reward {sum(rewards) / len(rewards):.2f}", flush=True)
