"""A reranker as a version of the base: `rollout-server serve`, then `python examples/rerank.py`.

A cross-encoder is trained that says which of eight answers is that of a sum. It is a LoRA adapter of the embedded base
with a head of one label, as PEFT saves it for `SEQ_CLS`; it reads a question and an answer as one sequence, and learns
that the right one scores highest. `/rerank` then orders the answers of questions that it was not trained on: once with
the adapter as it was made, and once as it was trained."""
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

from trainer_client import RolloutClient

CHOICES = 8


def question(a: int, b: int) -> tuple[str, list[str]]:
    """A sum and answers in any order; the wrong ones are up to 30 away."""
    wrong = [value for value in range(max(0, a + b - 30), a + b + 31) if value != a + b]
    answers = [a + b, *random.sample(wrong, CHOICES - 1)]
    random.shuffle(answers)
    return f"{a}+{b}=", [str(answer) for answer in answers]


class Reranker(nn.Module):
    """The base's hidden state at the last token, and a head on it."""

    def __init__(self) -> None:
        super().__init__()
        self.base, tokenizer = load(str(files("rollout_server") / "demo" / "model"))
        self.tokenizer = tokenizer._tokenizer
        self.base.set_dtype(mx.float32)
        self.base.freeze()
        linear_to_lora_layers(self.base, len(self.base.layers), {"rank": 16, "scale": 2.0, "dropout": 0.0})
        self.score = nn.Linear(self.base.args.hidden_size, 1, bias=False)

    def __call__(self, ids: mx.array, last: mx.array) -> mx.array:
        states = mx.take_along_axis(self.base.model(ids), last[:, None, None], 1)
        return self.score(states).reshape(-1, CHOICES)

    def pairs(self, questions: list[tuple[str, list[str]]]) -> tuple[mx.array, mx.array]:
        """Token ids of every pair, and where its last token is."""
        rows = [self.tokenizer(text, answer)["input_ids"] for text, answers in questions for answer in answers]
        longest = max(map(len, rows))
        return mx.array([row + [0] * (longest - len(row)) for row in rows]), mx.array([len(row) - 1 for row in rows])

    def adapter(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """(Tensors, adapter_config.json) as PEFT saves them."""
        tensors = {"base_model.model.score.weight": np.array(self.score.weight)}
        for name, array in tree_flatten(self.base.trainable_parameters()):
            path, _, half = name.rpartition(".lora_")
            tensors[f"base_model.model.{path}.lora_{half.upper()}.weight"] = np.array(array.T)
        modules = sorted({name.split(".")[-3] for name in tensors if ".lora_" in name})
        config = {"peft_type": "LORA", "task_type": "SEQ_CLS", "r": 16, "lora_alpha": 32, "target_modules": modules}
        return tensors, config | {"modules_to_save": ["classifier", "score"]}


def loss(model: Reranker, ids: mx.array, last: mx.array, right: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(ids, last), right, reduction="mean")


def held_out(client: RolloutClient, sums: list[tuple[int, int]]) -> tuple[float, float]:
    """How often the right answer comes first, and the mean of 1 / its rank."""
    ranks = []
    for a, b in sums:
        text, answers = question(a, b)
        ranked = [answers[each.index] for each in client.rerank(text, answers, model="reranker")]
        ranks.append(1 + ranked.index(str(a + b)))
    return float(np.mean([rank == 1 for rank in ranks])), float(np.mean([1 / rank for rank in ranks]))


parser = argparse.ArgumentParser()
parser.add_argument("--url", default="http://127.0.0.1:8000")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--questions", type=int, default=100, help="that are ranked before and after training")
options = parser.parse_args()
client = RolloutClient(options.url)
random.seed(0)
mx.random.seed(0)
sums = random.sample([(a, b) for a in range(100) for b in range(100)], 10_000)
asked, learned = sums[: options.questions], sums[options.questions :]
model, optimizer = Reranker(), optim.Adam(1e-3, bias_correction=True)
client.push("reranker", *model.adapter())
print("untrained  first {:.2f}  mean reciprocal rank {:.2f}".format(*held_out(client, asked)), flush=True)
for step in range(options.steps):
    questions = [question(a, b) for a, b in random.sample(learned, 24)]
    right = mx.array([answers.index(str(sum(map(int, text[:-1].split("+"))))) for text, answers in questions])
    value, gradients = nn.value_and_grad(model, loss)(model, *model.pairs(questions), right)
    optimizer.update(model, gradients)
    mx.eval(model.trainable_parameters(), optimizer.state)
    if step % 10 == 9:
        print(f"step {step + 1:3}  loss {value.item():.3f}", flush=True)
client.push("reranker", *model.adapter())
print("trained  first {:.2f}  mean reciprocal rank {:.2f}".format(*held_out(client, asked)), flush=True)
