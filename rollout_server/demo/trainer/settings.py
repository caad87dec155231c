"""What one run of the trainer is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes per step: `prompts` groups of `samples` rollouts."""

    url: str
    """The rollout server."""
    model: Path
    """The directory the server loaded its base from."""
    output: Path
    steps: int = 60
    seed: int = 0
    learning_rate: float = 5e-4
    push: bool = True
    """False pushes the first weights only: what the trainer and the server compute then drifts apart."""
    policy: str = "policy"
    """The name the adapter is pushed under."""
    rank: int = 16
    scale: float = 2.0
    """Factor of the low-rank product: alpha / rank."""
    prompts: int = 32
    samples: int = 8
    max_tokens: int = 16
    """The longest answer in any style takes nine."""
    clip: float = 0.2
    """How far from 1 a probability ratio still counts."""
    max_norm: float = 1.0
    """The largest norm of the gradient; a longer one is scaled down to it."""
    problems: int = 256
    """Held-out problems of the evaluation."""
