"""A rollout service for reinforcement learning on MLX."""

__version__ = "0.1.0"
