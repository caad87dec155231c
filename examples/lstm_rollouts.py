"""A policy that is an LSTM: written to a directory, served, and taught by policy gradient, pushed whole at each step.

    python examples/lstm_rollouts.py make /tmp/lstm          # a random model that writes letters
    rollout-server serve --model /tmp/lstm                   # in another terminal
    python examples/lstm_rollouts.py train /tmp/lstm         # its letters come to follow the alphabet

An LSTM of torch becomes such a directory by `python -m rollout_server.models.recurrent.from_torch`. The gradient may be
torch's too: `pushed_names` of that module gives a state dict the names of a push.
"""
# ruff: noqa: E402

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from rollout_server.machine.blas import load_fast_blas

load_fast_blas()  # before mlx is imported; it matters on a Linux CPU only

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, decoders, models

from rollout_server.models.recurrent.lstm import Model, ModelArgs
from trainer_client import RolloutClient

LETTERS = "abcdefghijklmnopqrstuvwxyz"
END = len(LETTERS)
CONFIG = {
    "model_type": "lstm",
    "vocab_size": END + 1,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "embedding_size": 32,
    "head_bias": True,
    "eos_token_id": END,
}


def make(directory: Path, seed: int = 0) -> Path:
    """A tokenizer of letters and an end token, and a model that knows nothing."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(LETTERS)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "config.json").write_text(json.dumps(CONFIG))
    mx.random.seed(seed)
    model = Model(ModelArgs.from_dict(CONFIG))
    mx.save_safetensors(str(directory / "model.safetensors"), dict(tree_flatten(model.parameters())))
    return directory


def loss(model: nn.Module, ids: mx.array, mask: mx.array, advantages: mx.array) -> mx.array:
    logits = model(ids)[:, :-1]  # the logits at one token choose the next
    logprobs = mx.take_along_axis(logits, ids[:, 1:, None], -1)[..., 0] - mx.logsumexp(logits, -1)
    return -(logprobs * advantages * mask).sum() / mask.sum()


def train(url: str, directory: Path, steps: int) -> list[float]:
    """The mean reward of each step."""
    model = Model(ModelArgs.from_dict(CONFIG))
    model.load_weights(str(directory / "model.safetensors"))
    optimizer = optim.Adam(0.02)
    means = []
    with RolloutClient(url) as client:
        for step in range(steps):
            version = client.push("writer", dict(tree_flatten(model.parameters())), {"kind": "full"}, label=f"{step}")
            prompts = [{"token_ids": [random.randrange(END)]} for _ in range(32)]
            seed = random.getrandbits(48)
            batch = client.rollouts(prompts, policy="writer", n=4, max_tokens=12, seed=seed, ignore_eos=True)
            batch.assert_synced(version)
            padded = batch.padded(prompt_padding="right")
            ids, mask = mx.array(padded["input_ids"]), mx.array(padded["loss_mask"])[:, 1:]
            # A letter is worth 1 behind the letter before it in the alphabet; each is judged by itself.
            rewards = ((ids[:, 1:] == ids[:, :-1] + 1) | ((ids[:, :-1] == END - 1) & (ids[:, 1:] == 0))) * mask
            means.append((rewards.sum() / mask.sum()).item())
            _, gradients = nn.value_and_grad(model, loss)(model, ids, mask, rewards - means[-1])
            optimizer.update(model, gradients)
            mx.eval(model.parameters(), optimizer.state)
            print(f"step {step:2}  writer@{version.version}  reward {means[-1]:.2f}  {batch[0].text}", flush=True)
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=["make", "train"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    if options.what == "make":
        print(make(options.directory))
    else:
        train(options.url, options.directory, options.steps)


if __name__ == "__main__":
    main()
