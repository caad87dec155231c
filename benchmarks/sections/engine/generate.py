"""Section `generate`: `generate` of Hugging Face transformers on the same weights, in one process with the engine."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx_lm
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from benchmarks.contenders.bare import BareLoop
from benchmarks.contenders.engine import EngineDecode
from benchmarks.measure import Load, interleave
from benchmarks.model import random_prompts, write_model
from benchmarks.record import Measured, Scale, Section, ratio

WHAT = (
    "The same float32 weights and prompts in one process, in turns: decode at temperature 1 from the first sampled "
    "token of every row to the last, prefill outside for everybody. `generate` runs under `torch.inference_mode` "
    "with PyTorch's own BLAS on all cores, sdpa attention and its default cache; `with logits` keeps "
    "`output_logits`, from which a trainer would compute the log-probabilities that the engine returns."
)


class FirstStep(StoppingCriteria):
    """Never stops; notes when the first tokens were there."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **rest: Any) -> torch.Tensor:
        if self.at is None:
            self.at = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool)


class TransformersGenerate:
    """Sampling at temperature 1 without filters, every row `steps` + 1 tokens."""

    def __init__(self, model: Any, prompts: list[list[int]], load: Load, *, logits: bool) -> None:
        self.name = "transformers generate, with logits" if logits else "transformers generate"
        self._model, self._load = model, load
        self._prompts = torch.tensor(prompts)
        length = load.steps + 1
        self._config = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=length,
            min_new_tokens=length,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=logits,
        )

    @torch.inference_mode()
    def run(self) -> tuple[int, float]:
        first = FirstStep()
        done = self._model.generate(
            self._prompts,
            attention_mask=torch.ones_like(self._prompts),
            generation_config=self._config,
            stopping_criteria=StoppingCriteriaList([first]),
        )
        end = time.perf_counter()
        sampled = done.sequences.shape[1] - self._prompts.shape[1]
        if first.at is None or sampled != self._load.steps + 1:
            raise RuntimeError(f"generate returned {sampled} tokens a row where {self._load.steps + 1} were asked for.")
        return self._load.tokens, end - first.at


def section(scale: Scale) -> Section:
    load = Load(steps=96 if scale.full else 32)
    prompts = random_prompts(load.rows, load.prompt_tokens)
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        directory = write_model(Path(folder) / "qwen3-33m")
        theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        model, _ = mlx_lm.load(str(directory))
        with EngineDecode(directory, prompts, load) as engine:
            contenders = [
                engine,
                BareLoop(model, prompts, load, compiled=False),
                *(TransformersGenerate(theirs, prompts, load, logits=logits) for logits in (False, True)),
            ]
            results = interleave(contenders, scale.rounds)
    found = {result.name: Measured(result.name, "tok/s", result.rates) for result in results}
    ours, _, plain, with_logits = found.values()
    return Section(
        "generate",
        "Against Hugging Face generate",
        WHAT,
        tuple(found.values()),
        (
            ratio("engine with log-probabilities / generate", ours, plain),
            ratio("engine with log-probabilities / generate with logits", ours, with_logits),
        ),
        facts={
            "rows": load.rows,
            "prompt tokens": load.prompt_tokens,
            "steps": load.steps,
            "torch threads": torch.get_num_threads(),
        },
    )
