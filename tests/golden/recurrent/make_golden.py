"""Writes the golden files of LSTMs: the state dict of a torch module, and the log-probabilities that torch gives.

`make golden-recurrent`, or `python -m tests.golden.recurrent.make_golden` where torch is installed. Weights are float16
in the files and float32 in both computations.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import nn

from tests.support.tiny_models import VOCAB_SIZE

HERE = Path(__file__).parent
LENGTHS = (61, 1, 17, 30)
SIZES = {"plain": (20, 28, 2, True, True), "tied": (24, 24, 1, True, False), "bare": (12, 32, 3, False, True)}
"""Widths of embedding and layers, layers, whether they have biases, and whether there is a head."""


class Language(nn.Module):
    def __init__(self, width: int, hidden: int, layers: int, bias: bool, head: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCAB_SIZE, width)
        self.rnn = nn.LSTM(width, hidden, layers, bias=bias, batch_first=True)
        if head:
            self.out = nn.Linear(hidden, VOCAB_SIZE, bias=bias)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        states, _ = self.rnn(self.words(ids))
        logits: torch.Tensor = self.out(states) if hasattr(self, "out") else states @ self.words.weight.T
        return logits


def main() -> None:
    for name, sizes in SIZES.items():
        write(name, Language(*sizes))


def write(name: str, model: Language) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            value = torch.randn(parameter.shape, generator=generator)
            value *= 0.3 if parameter.ndim == 1 else 1.5 * parameter.shape[-1] ** -0.5
            parameter.copy_(value.half())
        prompts = [torch.randint(0, VOCAB_SIZE, (length,), generator=generator) for length in LENGTHS]
        found = [model(ids[None])[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0].numpy() for ids in prompts]
    (HERE / name).mkdir(exist_ok=True)
    state = {key: value.numpy().astype(np.float16) for key, value in model.state_dict().items()}
    save_file(state, HERE / name / "state.safetensors")
    ids = np.concatenate([prompt.numpy() for prompt in prompts]).astype(np.int32)
    reference = {"prompts": ids, "lengths": np.array(LENGTHS, np.int32), "base": np.concatenate(found)}
    save_file(reference, HERE / name / "reference.safetensors")


if __name__ == "__main__":
    main()
