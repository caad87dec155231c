"""Makes the model of `grpo_pictures.py`: `python examples/pictures/tiny_model.py DIR [--steps 200]`.

A LLaVA with CLIP's tower and llama's decoder, each of two layers. It is shown shapes with their names until it knows
them, and then with names of which most are drawn by lot, so that about every second answer is right.
"""
# ruff: noqa: E402

import argparse
import json
import random
from pathlib import Path
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
from mlx_lm.utils import load_model
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaConfig, PreTrainedTokenizerFast

from rollout_server.engine.model.vision.load import settled
from rollout_server.models.vision.llava import llava

SHAPES = ("circle", "square", "triangle", "cross")
WORDS = ("<unk>", "<end>", "<image>", "name", *SHAPES)
SIZE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"model_type": "llama", "vocab_size": len(WORDS), "eos_token_id": 1, "bos_token_id": None, **SIZE}
TOWER = {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8, **SIZE}
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %} name"
)


def drawn(shape: str) -> Image.Image:
    """One in a size, colours and a place that are drawn by lot."""
    image = Image.new("RGB", (32, 32), tuple(random.choices(range(90), k=3)))
    pen, colour, size = ImageDraw.Draw(image), tuple(random.choices(range(150, 256), k=3)), random.randint(18, 26)
    x, y = random.randint(1, 31 - size), random.randint(1, 31 - size)
    right, low, third = x + size, y + size, size // 3
    match shape:
        case "circle":
            pen.ellipse((x, y, right, low), colour)
        case "square":
            pen.rectangle((x, y, right, low), colour)
        case "triangle":
            pen.polygon([(x, low), (right, low), (x + size // 2, y)], colour)
        case _:
            pen.rectangle((x + third, y, right - third, low), colour)
            pen.rectangle((x, y + third, right, low - third), colour)
    return image


class Seeing(nn.Module):
    """A decoder that reads a picture's features in the place of its placeholders."""

    def __init__(self, text: Any, tower: Any) -> None:
        super().__init__()
        self.text, self.tower = text, tower

    def features(self, pixels: mx.array) -> mx.array:
        """All pictures at once, as they have one size; the server takes them one by one."""
        states = self.tower.vision_tower.states(pixels)[-1]
        return self.tower.multi_modal_projector(states[:, 1:])

    def __call__(self, ids: mx.array, features: mx.array) -> mx.array:
        """Logits of rows that begin with their picture."""
        embeddings = self.text.language_model.model.embed_tokens(ids)
        joined = mx.concatenate([features, embeddings[:, features.shape[1] :]], axis=1)
        return self.text(ids, input_embeddings=joined)


def make(directory: Path, steps: int) -> None:
    config = LlavaConfig(text_config=TEXT, vision_config=TOWER, image_token_index=2, vision_feature_layer=-1)
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(directory)
    words = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "eos_token": "<end>", "extra_special_tokens": {"image_token": "<image>"}}
    PreTrainedTokenizerFast(tokenizer_object=words, chat_template=TEMPLATE, **special).save_pretrained(directory)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(directory)
    text = load_model(directory, lazy=True, strict=False)[0]
    model = Seeing(text, llava(settled(json.loads((directory / "config.json").read_text()))).tower)
    optimizer = optim.Adam(1e-3)

    def loss(model: Seeing, pixels: mx.array, ids: mx.array) -> mx.array:
        logits = model(ids, model.features(pixels))[:, -3:-1]
        return nn.losses.cross_entropy(logits, ids[:, -2:], reduction="mean")

    for step in range(steps):
        shapes, known = random.choices(SHAPES, k=64), step < steps * 0.7
        said = [shape if known or random.random() < 0.4 else random.choice(SHAPES) for shape in shapes]
        ids = mx.array([[2] * 16 + [3, WORDS.index(word), 1] for word in said])
        pixels = mx.array(np.array(processor(images=[drawn(shape) for shape in shapes])["pixel_values"]))
        value, gradients = nn.value_and_grad(model, loss)(model, pixels, ids)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        if step % 20 == 19:
            print(f"making the model, step {step + 1:3}  loss {float(value):.3f}", flush=True)
    weights = dict(tree_flatten(text.parameters())) | dict(tree_flatten(model.tower.parameters()))
    kernel = "vision_tower.embeddings.patch_embedding.weight"
    mx.save_safetensors(str(directory / "model.safetensors"), weights | {kernel: weights[kernel].reshape(-1, 3, 8, 8)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    make(options.directory, options.steps)
