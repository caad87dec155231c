"""GRPO against a learned reward on one server: `rollout-server serve`, then `python examples/grpo_reward_model.py`.

A reward model is trained first, as PEFT's `SEQ_CLS` adapter of the embedded base: rows of the base are labelled by the
rule that is meant (the sum in plain digits), and LoRA layers and a head learn to tell them apart. Every rollout of the
policy then comes with its reward, and teaches the reward model on, which is pushed anew at every step: else the policy
soon finds what only looks right. `--plot FILE.png` draws reward and accuracy (matplotlib)."""
# ruff: noqa: E402

import argparse
import random
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
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.tuner.utils import linear_to_lora_layers

from trainer_client import RolloutBatch, RolloutClient

LORA = {"rank": 16, "scale": 2.0, "dropout": 0.0}


def with_lora() -> Any:
    model = load(str(files("rollout_server") / "demo" / "model"))[0]
    model.set_dtype(mx.float32)
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), LORA)
    return model


def ask(client: RolloutClient, count: int, **options: Any) -> tuple[RolloutBatch, np.ndarray]:
    """Rollouts of so many problems, and for each row whether it is the sum in plain digits, and ends there."""
    asked = [(random.randrange(100), random.randrange(100)) for _ in range(count)]
    prompts, seed = [f"{a}+{b}=" for a, b in asked], random.getrandbits(48)
    batch = client.rollouts(prompts, max_tokens=16, temperature=1.0, seed=seed, **options)
    right = [row.finish_reason == "stop" and row.text == str(sum(asked[row.prompt_index])) for row in batch]
    return batch, np.array(right, np.float32)


class RewardModel(nn.Module):
    """The base's hidden state at a row's last token, and a head on it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = with_lora()
        self.score = nn.Linear(self.base.args.hidden_size, 1, bias=False)

    def __call__(self, ids: mx.array, last: mx.array) -> mx.array:
        return self.score(mx.take_along_axis(self.base.model(ids), last[:, None, None], 1))[:, 0, 0]

    def adapter(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """(Tensors, adapter_config.json) as PEFT saves them."""
        tensors = {"base_model.model.score.weight": np.array(self.score.weight)}
        for name, array in tree_flatten(self.base.trainable_parameters()):
            path, _, half = name.rpartition(".lora_")
            tensors[f"base_model.model.{path}.lora_{half.upper()}.weight"] = np.array(array.T)
        modules = sorted({name.split(".")[-3] for name in tensors if ".lora_" in name})
        config = {"peft_type": "LORA", "task_type": "SEQ_CLS", "r": 16, "lora_alpha": 32, "target_modules": modules}
        return tensors, config | {"modules_to_save": ["classifier", "score"]}


def improve(model: nn.Module, optimizer: optim.Optimizer, loss: Any, *arrays: np.ndarray) -> float:
    value, gradients = nn.value_and_grad(model, loss)(model, *map(mx.array, arrays))
    optimizer.update(model, gradients)
    mx.eval(model.trainable_parameters(), optimizer.state)
    return float(value)


def judge(model: RewardModel, ids: mx.array, attention: mx.array, right: mx.array) -> mx.array:
    return nn.losses.binary_cross_entropy(model(ids, attention.sum(1) - 1), right)


def surrogate(model: nn.Module, ids: mx.array, mask: mx.array, sampled: mx.array, advantages: mx.array) -> mx.array:
    logits = model(ids)[:, :-1]  # the logits at one token choose the next
    logprobs = mx.take_along_axis(logits, ids[:, 1:, None], -1)[..., 0] - mx.logsumexp(logits, -1)
    return -(mx.exp(logprobs - sampled[:, 1:]) * advantages[:, None] * mask[:, 1:]).sum() / mask.sum()


parser = argparse.ArgumentParser()
parser.add_argument("--url", default="http://127.0.0.1:8000")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--plot")
options = parser.parse_args()
random.seed(0)
mx.random.seed(0)
client = RolloutClient(options.url)
judging, teacher = RewardModel(), optim.Adam(1e-3, bias_correction=True)
for step in range(30):
    batch, right = ask(client, 128)
    padded = batch.padded(prompt_padding="right")
    loss = improve(judging, teacher, judge, padded["input_ids"], padded["attention_mask"], right)
    print(f"reward model, step {step:2}  loss {loss:.3f}", flush=True)
policy, optimizer, curve = with_lora(), optim.Adam(1e-3, betas=[0.9, 0.95], bias_correction=True), []
config = {"fine_tune_type": "lora", "num_layers": len(policy.layers), "lora_parameters": LORA}
for step in range(options.steps):
    client.push("rm", *judging.adapter())
    version = client.push("policy", dict(tree_flatten(policy.trainable_parameters())), config)
    batch, right = ask(client, 32, policy=version, n=8, reward="rm")
    rewards = 1 / (1 + np.exp(-batch.rewards))
    padded = batch.padded(prompt_padding="right")
    arrays = (padded["input_ids"], padded["loss_mask"], padded["logprobs"], batch.advantages(rewards))
    improve(policy, optimizer, surrogate, *arrays)
    for _ in range(4):  # what the policy has found out meanwhile is judged, too
        improve(judging, teacher, judge, padded["input_ids"], padded["attention_mask"], right)
    curve.append((rewards.mean(), right.mean()))
    print(f"step {step:2}  reward {rewards.mean():.2f}  right {right.mean():.2f}", flush=True)
if options.plot:
    from matplotlib.figure import Figure

    axes = Figure().subplots(subplot_kw={"xlabel": "step", "ylabel": "mean of a batch"})
    axes.plot(curve)
    axes.legend(("reward model", "sum in plain digits"))
    axes.figure.savefig(options.plot)
