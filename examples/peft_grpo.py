"""GRPO with PyTorch and PEFT: the trainer is torch, the sampler is this server, and each step pushes the adapter.

    rollout-server serve                      # in one terminal: the embedded model
    python examples/peft_grpo.py              # in another, where torch, transformers and peft are installed

Only plain sums in digits are rewarded, and the embedded model answers in several styles: the reward rises from 0.3 to
above 0.9 in a few minutes on a CPU. Every step also recomputes the log-probability of each sampled token in torch,
under the adapter that was pushed: `gap` is the largest difference from what the server returned. For a model of your
own: `rollout-server serve --model DIR`, then `--model DIR` here, with your prompts and your reward. On a CPU with few
cores, OMP_WAIT_POLICY=PASSIVE in the environment keeps torch's threads from spinning while the server works.
"""

from __future__ import annotations

import argparse
import random
from importlib.resources import files

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trainer_client import RolloutBatch, RolloutClient

LARGEST_GAP = 1e-3
"""Nats. Float32 on both sides gives some 1e-5; a wrong transpose, scale or version gives more than 0.01."""


def token_logprobs(model: torch.nn.Module, batch: RolloutBatch) -> torch.Tensor:
    """float32 [N]: log-probabilities of the sampled tokens under the model as it is now, in the batch's flat order."""
    padded = {name: torch.from_numpy(array) for name, array in batch.padded().items()}
    logits = model(
        input_ids=padded["input_ids"].long(),
        attention_mask=padded["attention_mask"].long(),
        position_ids=padded["position_ids"].long(),
    ).logits[:, :-1]
    chosen = padded["input_ids"][:, 1:, None].long()
    logprobs = logits.gather(-1, chosen)[..., 0] - logits.logsumexp(-1)
    return logprobs[padded["completion_mask"][:, 1:].bool()]


def surrogate(new: torch.Tensor, batch: RolloutBatch, rewards: list[float], clip: float = 0.2) -> torch.Tensor:
    """The clipped policy-gradient loss, mean over the sampled tokens."""
    sampled = torch.from_numpy(batch.denominator("unmodified"))
    advantages = torch.from_numpy(batch.per_token(batch.advantages(rewards)))
    mask = torch.from_numpy(batch.loss_mask).float()
    ratio = (new - sampled).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -(gain * mask).sum() / mask.sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default=str(files("rollout_server") / "demo" / "model"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--dora", action="store_true", help="train DoRA instead of LoRA")
    options = parser.parse_args()

    torch.manual_seed(0)
    draw = random.Random(0)
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", use_dora=options.dora, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    model.eval()  # no dropout: the sampler has none either
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3, betas=(0.9, 0.95))

    with RolloutClient(options.url) as client:
        for step in range(options.steps):
            version = client.push("peft-policy", model, label=f"step-{step}")
            problems = [(draw.randrange(100), draw.randrange(100)) for _ in range(32)]
            prompts = [f"{a}+{b}=" for a, b in problems]
            batch = client.rollouts(prompts, policy="peft-policy", n=8, max_tokens=16, seed=draw.getrandbits(48))
            batch.assert_synced(version)
            answers = [str(sum(problems[row.prompt_index])) for row in batch]
            rewards = [
                float(row.finish_reason == "stop" and row.text == answer)
                for row, answer in zip(batch, answers, strict=True)
            ]
            new = token_logprobs(model, batch)
            gap = float(np.abs(new.detach().numpy() - batch.logprobs).max())
            if gap > LARGEST_GAP:
                raise SystemExit(f"Trainer and sampler differ by {gap:.1e} nats: they do not compute the same policy.")
            optimizer.zero_grad()
            surrogate(new, batch, rewards).backward()
            optimizer.step()
            reward = sum(rewards) / len(rewards)
            print(f"step {step:2}  peft-policy@{version.version}  reward {reward:.2f}  gap {gap:.1e}", flush=True)


if __name__ == "__main__":
    main()
