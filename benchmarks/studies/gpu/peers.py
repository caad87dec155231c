"""Parts about others that do a trainer's step: mlx-lm in this process and as a server, transformers with PEFT."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.studies.gpu.figures import Figure
from benchmarks.studies.gpu.held import Held
from benchmarks.whole_job.job import Job
from benchmarks.whole_job.mlx_lm import BatchGeneratorJob, mlx_lm_server


def batch_generator(held: Held) -> Iterator[Figure]:
    """mlx-lm's `BatchGenerator`, which has the adapter from the start and gets every prompt repeated."""
    held.free()
    job = held.job()
    generator = BatchGeneratorJob(job, held.size.rows, held.adapter_folder("mlx"))
    rates = tuple(job.sampled / generator.seconds(number) for number in range(1, held.rounds + 1))
    del generator
    gc.collect()
    yield Figure("BatchGenerator, LoRA, a step", "tok/s", rates)


def mlx_server(held: Held) -> Iterator[Figure]:
    """`mlx_lm.server`, which has the adapter from the start; log-probabilities are returned."""
    held.free()
    job = held.job()
    with mlx_lm_server(job, held.size.rows, held.adapter_folder("mlx")) as server:
        rates = tuple(server.rate(number) for number in range(held.rounds + 1))
    yield Figure("mlx_lm.server, LoRA, a step", "tok/s", rates[1:])


def transformers(held: Held) -> Iterator[Figure]:
    """`generate` of transformers with PEFT's layers, at its defaults, without log-probabilities. Needs torch."""
    held.free()
    job = held.job()
    generate = PeftGenerate(job, str(held.adapter_folder("peft")))
    rates = tuple(job.sampled / generate.seconds(number) for number in range(held.rounds + 1))
    yield Figure("transformers and PEFT, LoRA, a step", "tok/s", rates[1:])


class PeftGenerate:
    """The weights and the adapter that the others have, sampled at temperature 1 without filters."""

    def __init__(self, job: Job, adapter: str) -> None:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        self._torch = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if self._device == "cuda" else torch.float32
        base = AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype).to(self._device)
        self._model: Any = PeftModel.from_pretrained(base, adapter).eval()
        self._job = job

    def seconds(self, number: int) -> float:
        job, torch = self._job, self._torch
        ids = torch.tensor(job.ids(number), device=self._device)
        began = time.perf_counter()
        with torch.inference_mode():
            done = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                num_return_sequences=job.n,
                max_new_tokens=job.tokens,
                min_new_tokens=job.tokens,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                eos_token_id=None,
                pad_token_id=0,
            )
        sampled = done[:, job.prompt_tokens :].cpu().numpy().size
        seconds = time.perf_counter() - began
        if sampled != job.sampled:
            raise RuntimeError(f"generate sampled {sampled} tokens where {job.sampled} were asked for.")
        return seconds
