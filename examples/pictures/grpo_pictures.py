"""GRPO with pictures. `python examples/pictures/tiny_model.py DIR` makes a model that names shapes, about every second
one right; then `rollout-server serve --model DIR`, and elsewhere `python examples/pictures/grpo_pictures.py DIR`.

The trainer draws shapes, sends them as pictures, rewards the right name, and trains LoRA layers on the language half.
"""
# ruff: noqa: E402

import argparse
import random
from pathlib import Path

from rollout_server.machine.blas import load_fast_blas
from rollout_server.open_files import import_mlx_lm

load_fast_blas()  # before mlx is imported; it matters on a Linux CPU only
import_mlx_lm()  # which fails by itself where fewer than 4096 files may be open

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model
from tiny_model import SHAPES, Seeing, drawn
from transformers import AutoImageProcessor

from rollout_server.engine.model.vision.load import read_vision
from trainer_client import RolloutClient

LORA = {"rank": 16, "scale": 2.0, "dropout": 0.0}


def loss(
    model: nn.Module, ids: mx.array, features: mx.array, mask: mx.array, sampled: mx.array, advantages: mx.array
) -> mx.array:
    logits = model(ids, features)[:, :-1]  # the logits at one token choose the next
    logprobs = mx.take_along_axis(logits, ids[:, 1:, None], -1)[..., 0] - mx.logsumexp(logits, -1)
    return -(mx.exp(logprobs - sampled[:, 1:]) * advantages[:, None] * mask[:, 1:]).sum() / mask.sum()


parser = argparse.ArgumentParser()
parser.add_argument("directory", type=Path)
parser.add_argument("--url", default="http://127.0.0.1:8000")
parser.add_argument("--steps", type=int, default=40)
options = parser.parse_args()
text, config = load_model(options.directory)
vision = read_vision(options.directory, config)
processor = AutoImageProcessor.from_pretrained(options.directory, backend="pil")
text.freeze()
linear_to_lora_layers(text, len(text.layers), LORA)
model, optimizer = Seeing(text, vision.tower), optim.Adam(3e-3, betas=[0.9, 0.95], bias_correction=True)
adapter = {"fine_tune_type": "lora", "num_layers": len(text.layers), "lora_parameters": LORA}
client = RolloutClient(options.url)
for step in range(options.steps):
    version = client.push("policy", dict(tree_flatten(text.trainable_parameters())), adapter)
    shapes = random.choices(SHAPES, k=32)
    images = [drawn(shape) for shape in shapes]
    prompts = [{"messages": [{"role": "user", "content": [{"type": "image", "image": image}]}]} for image in images]
    batch = client.rollouts(prompts, policy="policy", n=8, max_tokens=2, temperature=1.0)
    batch.assert_synced(version)
    rewards = [float(row.text == shapes[row.prompt_index] and row.finish_reason == "stop") for row in batch]
    padded = batch.padded(prompt_padding="right")
    # The server's processor and tower, on the same pictures: the trainer's numbers are the server's.
    features = model.features(mx.array(np.array(processor(images=images)["pixel_values"])))
    seen = mx.stop_gradient(features[mx.array(batch.prompt_index)])
    arrays = (padded["loss_mask"], padded["logprobs"], batch.advantages(rewards))
    found = nn.value_and_grad(model, loss)(model, mx.array(padded["input_ids"]), seen, *map(mx.array, arrays))
    optimizer.update(model, found[1])
    mx.eval(text.trainable_parameters(), optimizer.state)
    print(f"step {step:2}  policy@{version.version}  reward {sum(rewards) / len(rewards):.2f}", flush=True)
