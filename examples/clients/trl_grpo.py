"""TRL's GRPOTrainer on this server: a `rollout_func` that pushes the PEFT adapter and samples with that version.

    rollout-server serve                      # in one terminal: the embedded model
    python examples/clients/trl_grpo.py               # in another, where trl and peft are installed

Only plain sums in digits are rewarded, and the embedded model answers in several styles: the reward rises from 0.4 to
above 0.9 in a few minutes on a CPU. TRL corrects nothing that its own vLLM did not sample, so the run is on-policy: one
update for each batch, and every batch from the version just pushed. Every batch is recomputed in torch: `gap` is the
largest difference from what the server returned, `before` the largest under the adapter of the step before, which is
what the gap would be if a push had done nothing. OMP_WAIT_POLICY=PASSIVE helps on a CPU with few cores.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from importlib.resources import files
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trainer_client import PublishedVersion, RolloutBatch, RolloutClient

LARGEST_GAP = 1e-3
"""Nats. Float32 on both sides gives some 1e-5; a wrong transpose, scale or version gives more than 0.01."""
Adapter = dict[str, torch.Tensor]


@torch.no_grad()
def largest_difference(model: torch.nn.Module, adapter: Adapter, batch: RolloutBatch) -> float:
    """Between the log-probabilities that the server returned and those of the model wearing `adapter`."""
    padded = {name: torch.from_numpy(array) for name, array in batch.padded().items()}
    names = ("input_ids", "attention_mask", "position_ids")
    read = {name: padded[name].long() for name in names}
    logits = torch.func.functional_call(model, adapter, kwargs=read).logits[:, :-1]
    chosen = logits.gather(-1, read["input_ids"][:, 1:, None])[..., 0] - logits.logsumexp(-1)
    ours = chosen[padded["completion_mask"][:, 1:].bool()]
    return float((ours - torch.from_numpy(batch.logprobs)).abs().max())


class Rollouts(TrainerCallback):
    """What `GRPOTrainer` calls for each batch, and the line it prints for each step."""

    def __init__(self, client: RolloutClient, policy: str) -> None:
        self.client, self.policy = client, policy
        self.version: PublishedVersion | None = None
        self.adapter: Adapter = {}
        self.gap = self.before = 0.0

    def __call__(self, prompts: list[Any], trainer: GRPOTrainer) -> dict[str, list[Any]]:
        """`prompts` holds each one `num_generations` times; the samples of equal prompts differ all the same."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        step = trainer.state.global_step
        self.version = self.client.push(self.policy, model, label=f"step-{step}")
        batch = self.client.rollouts(
            prompts,
            policy=self.policy,
            min_version=self.version.version,
            max_tokens=trainer.args.max_completion_length,
            temperature=trainer.args.temperature,
            seed=step,
        )
        batch.assert_synced(self.version)
        self.compare(model, batch)
        return {
            "prompt_ids": [list(row.prompt_token_ids) for row in batch],
            "completion_ids": [list(row.token_ids) for row in batch],
            "logprobs": [list(map(float, row.logprobs)) for row in batch],
            # Further fields reach the reward functions.
            "finish_reason": [row.finish_reason for row in batch],
        }

    def compare(self, model: torch.nn.Module, batch: RolloutBatch) -> None:
        adapter = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
        self.gap = largest_difference(model, adapter, batch)
        self.before = largest_difference(model, self.adapter or adapter, batch)
        self.adapter = adapter
        if self.gap > LARGEST_GAP:
            raise SystemExit(f"Trainer and sampler differ by {self.gap:.1e} nats: they do not compute the same policy.")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if self.version is not None and logs is not None and "reward" in logs:
            step, number = state.global_step - 1, self.version.version
            sync = f"gap {self.gap:.1e}  before {self.before:.1e}"
            print(f"step {step:2}  {self.policy}@{number}  reward {logs['reward']:.2f}  {sync}", flush=True)


def plain_sum(completions: list[str], answer: list[str], finish_reason: list[str], **_: Any) -> list[float]:
    rows = zip(completions, answer, finish_reason, strict=True)
    return [float(reason == "stop" and text == expected) for text, expected, reason in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default=str(files("rollout_server") / "demo" / "model"))
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()

    draw = random.Random(0)
    sums = [(draw.randrange(100), draw.randrange(100)) for _ in range(32 * options.steps)]
    dataset = Dataset.from_list([{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in sums])
    with tempfile.TemporaryDirectory() as directory, RolloutClient(options.url) as client:
        rollouts = Rollouts(client, "trl-policy")
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(options.model, padding_side="left"),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            reward_funcs=plain_sum,
            train_dataset=dataset,
            rollout_func=rollouts,
            callbacks=[rollouts],
            args=GRPOConfig(
                output_dir=directory,
                max_steps=options.steps,
                # 32 prompts, 8 samples each, one update: nothing is off-policy.
                per_device_train_batch_size=256,
                gradient_accumulation_steps=1,
                num_generations=8,
                num_iterations=1,
                max_completion_length=16,
                temperature=1.0,
                learning_rate=1e-3,
                lr_scheduler_type="constant",
                adam_beta2=0.95,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                logging_steps=1,
                disable_tqdm=True,
                report_to="none",
                save_strategy="no",
            ),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


if __name__ == "__main__":
    main()
