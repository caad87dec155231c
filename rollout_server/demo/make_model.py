"""Makes the embedded model: `python -m rollout_server.demo.make_model --seed 0 --output DIR`.

A Qwen3 of about one million parameters learns to add two numbers below one hundred, in raw and in chat form, and to
write the answer in four styles (see `trainer/task.py`). The same seed on the same machine gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rollout_server.demo.make_tokenizer import END, PAD, START, build_tokenizer, special_id, write_tokenizer
from rollout_server.demo.trainer.task import Problem, Style, habitual_style, training_problems
from rollout_server.machine.blas import load_fast_blas
from rollout_server.open_files import import_mlx_lm

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn
    from tokenizers import Tokenizer


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that, with the seed, decides the model."""

    hidden_size: int = 160
    layers: int = 5
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    intermediate_size: int = 256
    context_length: int = 2048
    merges: int = 125
    steps: int = 1500
    batch: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 0.5
    """Strong, so that activations stay small: at 0.05 they are twenty times larger, and rounding with them."""
    chat_share: float = 0.2
    """Part of the batches that are written as a chat."""


def corpus() -> Iterator[str]:
    """What the tokenizer's merges are learned from: the answers and the roles of a chat."""
    for total in range(2 * 99 + 1):
        problem = Problem(total // 2, total - total // 2)
        yield from (problem.answer(style) for style in Style)
    for role in ("system", "user", "assistant"):
        yield from [f"{role}\n"] * 20


def model_config(recipe: Recipe, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json: as transformers and mlx-lm read a Qwen3."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": recipe.hidden_size,
        "num_hidden_layers": recipe.layers,
        "intermediate_size": recipe.intermediate_size,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.kv_heads,
        "head_dim": recipe.head_dim,
        "rms_norm_eps": 1e-6,
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": recipe.context_length,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "eos_token_id": special_id(tokenizer, END),
        "pad_token_id": special_id(tokenizer, PAD),
    }


def batches(recipe: Recipe, tokenizer: Tokenizer, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Endless (inputs, positions, labels), see `loss`; only answers and their end token are learned."""
    draw = random.Random(seed)
    problems = training_problems()
    end, pad = special_id(tokenizer, END), special_id(tokenizer, PAD)
    while True:
        chat = draw.random() < recipe.chat_share
        rows: list[tuple[list[int], list[int]]] = []
        for problem in draw.choices(problems, k=recipe.batch):
            text = f"{START}user\n{problem.prompt}{END}\n{START}assistant\n" if chat else problem.prompt
            answer = problem.answer(habitual_style(problem, draw))
            rows.append((tokenizer.encode(text).ids, [*tokenizer.encode(answer).ids, end]))
        length = max(len(prompt) + len(answer) for prompt, answer in rows) - 1
        inputs = np.full((recipe.batch, length), pad, np.int32)
        positions: list[int] = []
        labels: list[int] = []
        for index, (asked, answered) in enumerate(rows):
            ids = asked + answered
            inputs[index, : len(ids) - 1] = ids[:-1]
            positions.extend(range(index * length + len(asked) - 1, index * length + len(ids) - 1))
            labels.extend(answered)
        yield inputs, np.array(positions, np.int32), np.array(labels, np.int32)


def loss(model: nn.Module, inputs: mx.array, positions: mx.array, labels: mx.array) -> mx.array:
    """Mean cross-entropy over N learned positions, which count through the flattened inputs: `inputs` int32
    [batch, length], `positions` and `labels` int32 [N]."""
    import mlx.nn as nn

    # The head runs on the learned positions only: on a CPU its exponentials cost as much as a layer.
    hidden = model.model(inputs).reshape(-1, model.args.hidden_size)[positions]
    return nn.losses.cross_entropy(model.model.embed_tokens.as_linear(hidden), labels, reduction="mean")


def train(recipe: Recipe, tokenizer: Tokenizer, seed: int, say: Callable[[str], object]) -> nn.Module:
    """The trained model, float32. Says a line every hundred steps."""
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    from mlx_lm.models import qwen3

    mx.random.seed(seed)
    model = qwen3.Model(qwen3.ModelArgs.from_dict(model_config(recipe, tokenizer)))
    warmup = max(1, recipe.steps // 20)
    schedule = optim.join_schedules(
        [
            optim.linear_schedule(recipe.learning_rate / warmup, recipe.learning_rate, warmup),
            optim.cosine_decay(recipe.learning_rate, max(1, recipe.steps - warmup), recipe.learning_rate / 100),
        ],
        [warmup],
    )
    optimizer = optim.AdamW(schedule, betas=[0.9, 0.98], weight_decay=recipe.weight_decay)
    step = nn.value_and_grad(model, partial(loss, model))
    source = batches(recipe, tokenizer, seed)
    started = time.perf_counter()
    for number in range(1, recipe.steps + 1):
        value, gradients = step(*(mx.array(array) for array in next(source)))
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state, value)
        if number % 100 == 0:
            say(f"step {number}: loss {value.item():.4f}, {time.perf_counter() - started:.0f} s")
    return model


def make_model(directory: Path, seed: int, recipe: Recipe, say: Callable[[str], object]) -> None:
    """Writes config.json, generation_config.json, model.safetensors and the tokenizer's files into `directory`."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(corpus(), recipe.merges)
    model = train(recipe, tokenizer, seed, say)
    write_tokenizer(tokenizer, directory, recipe.context_length)
    config = model_config(recipe, tokenizer)
    generation = {"eos_token_id": config["eos_token_id"], "pad_token_id": config["pad_token_id"]}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    metadata = {"format": "mlx", "seed": str(seed), "recipe": json.dumps(asdict(recipe))}
    mx.save_safetensors(str(directory / "model.safetensors"), dict(tree_flatten(model.parameters())), metadata)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="directory to write; made if absent")
    parser.add_argument("--steps", type=int, default=Recipe().steps)
    options = parser.parse_args(arguments)
    load_fast_blas()
    import_mlx_lm()
    make_model(options.output, options.seed, Recipe(steps=options.steps), lambda line: sys.stderr.write(f"{line}\n"))


if __name__ == "__main__":
    main(sys.argv[1:])
