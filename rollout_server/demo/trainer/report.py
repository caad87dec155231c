"""What a run leaves behind: figures, a picture, and the files with which a third party can check both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from trainer_client import PublishedVersion

from .evaluation import Evaluation
from .loop import Agreement, Sampled, Step

GAP_LIMIT = 1e-4
"""Nats; float32 on both sides stays well below."""


def summary(
    steps: Sequence[Step],
    base: Evaluation,
    final: Evaluation,
    last: tuple[Sampled, Agreement],
    version: PublishedVersion,
) -> dict[str, Any]:
    """The figures of result.json that the trainer knows. Gaps are over every sampled token of the run, the closing
    rollouts (`last`, sampled from the final version) included."""
    sampled, agreement = last
    agreements: list[Step | Agreement] = [*steps, agreement]
    tokens = sum(entry.tokens for entry in agreements)
    pushes = [step.push_ms for step in steps if step.push_ms is not None]
    ratio = sum(entry.mean_abs_ratio_minus_one * entry.tokens for entry in agreements) / tokens
    return {
        "base_accuracy": base.accuracy,
        "final_accuracy": final.accuracy,
        "lenient_accuracy": {"before": base.lenient_accuracy, "after": final.lenient_accuracy},
        "problems": len(base.problems),
        "steps": len(steps),
        "max_abs_logprob_gap": max(entry.max_abs_gap for entry in agreements),
        "mean_abs_ratio_minus_one": ratio,
        "push_ms_p50": float(np.percentile(pushes, 50)),
        "push_ms_p95": float(np.percentile(pushes, 95)),
        "tokens_per_s": tokens / (sum(step.rollout_seconds for step in steps) + sampled.seconds),
        "sampled_tokens": tokens,
        "first_reward": steps[0].reward,
        "last_reward": float(sampled.rewards.mean()),
        "final_version": version.version,
        "final_digest": version.digest,
    }


def write_steps(path: Path, steps: Sequence[Step]) -> None:
    path.write_text("".join(json.dumps(asdict(step)) + "\n" for step in steps), encoding="utf-8")


def write_held_out(path: Path, base: Evaluation, final: Evaluation) -> None:
    """One JSON object per held-out problem: prompt, right answer, and both greedy answers."""
    lines = []
    for index, problem in enumerate(base.problems):
        entry: dict[str, Any] = {"prompt": problem.prompt, "answer": str(problem.total)}
        for name, evaluation in (("base", base), ("final", final)):
            entry[name] = {"text": evaluation.texts[index], "ended": evaluation.ended[index]}
        lines.append(json.dumps(entry) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def write_rollouts(path: Path, sampled: Sampled, version: PublishedVersion) -> None:
    """The closing rollouts as safetensors, arrays named as in the binary reply of `/v1/rollouts`; `version` sampled all
    of them and its weights are kept beside, so every log-probability can be computed again."""
    batch = sampled.batch
    # Rows come ordered by prompt: the first row of each group has its prompt.
    _, firsts = np.unique(batch.prompt_index, return_index=True)
    prompts = [batch[int(first)].prompt_token_ids for first in firsts]
    arrays = {
        "token_ids": batch.token_ids,
        "logprobs": batch.logprobs,
        "loss_mask": batch.loss_mask,
        "offsets": batch.offsets,
        "prompt_index": batch.prompt_index,
        "sample_index": batch.sample_index,
        "seed": batch.seeds,
        "prompt_token_ids": np.concatenate(prompts),
        "prompt_offsets": np.cumsum([0, *map(len, prompts)], dtype=np.int64),
        "reward": sampled.rewards,
    }
    metadata = {"format": "1", "policy": version.name, "version": str(version.version), "digest": version.digest}
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path, metadata)


def draw(path: Path, steps: Sequence[Step]) -> bool:
    """reward.png: reward, log-probability gap and push latency over the steps. False if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return False
    figure = Figure(figsize=(8, 8), layout="constrained")
    FigureCanvasAgg(figure)
    numbers = [step.step for step in steps]
    reward, gap, push = figure.subplots(3, 1, sharex=True)
    reward.plot(numbers, [step.reward for step in steps], label="rewarded style")
    reward.plot(numbers, [step.lenient for step in steps], label="any style", linestyle="--")
    reward.set(ylabel="mean reward", ylim=(0, 1.02), title="GRPO through rollout-server")
    reward.legend(loc="lower right")
    gap.semilogy(numbers, [step.max_abs_gap for step in steps], color="tab:red")
    gap.axhline(GAP_LIMIT, color="grey", linestyle=":")
    gap.set(ylabel="max |trainer − server|\nlog-probability, nats")
    pushed = [step for step in steps if step.push_ms is not None]
    push.plot([step.step for step in pushed], [step.push_ms for step in pushed], color="tab:green")
    push.set(ylabel="push, ms", xlabel="step", ylim=(0, None))
    for axis in (reward, gap, push):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return True
