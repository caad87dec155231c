"""Which activation config.json asks for and which one the family's code has, in its feed-forward layers."""

from __future__ import annotations

from typing import Any

from rollout_server.engine.model.checkpoint.family import Family
from rollout_server.engine.model.checkpoint.meaning import Meaning

FIELDS = ("hidden_activation", "hidden_act", "mlp_hidden_act", "activation_function")
NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu by tanh",
    "gelu_pytorch_tanh": "gelu by tanh",
    "gelu_fast": "gelu by tanh",
    "gelu_accurate": "gelu by tanh",
    "quick_gelu": "quick gelu",
    "relu": "relu",
    "relu2": "relu squared",
    "xielu": "xielu",
}
"""transformers' names → one name for each function."""
CALLED = {
    "silu": "silu",
    "swiglu": "silu",
    "SwiGLU": "silu",
    "SwitchGLU": "silu",
    "gelu": "gelu",
    "gelu_approx": "gelu by tanh",
    "geglu": "gelu by tanh",
    "relu2": "relu squared",
    "relu_squared": "relu squared",
    "XieLU": "xielu",
}
"""What the source of a family mentions → which function that is."""
WRITTEN = {"gemma4_text": "gelu by tanh", "nanochat": "relu squared", "nemotron_h": "relu squared"}
"""Families whose source mentions more than one: that of their feed-forward layers."""


def written(family: Family) -> str | None:
    """The activation in the family's code; None if it cannot be told."""
    found = {CALLED[name] for name in family.calls & CALLED.keys()}
    return WRITTEN.get(family.name) or (found.pop() if len(found) == 1 else None)


def asked_for(said: Meaning, family: Family) -> tuple[str, Any] | None:
    """(field, value) of config.json where the family's code has another activation."""
    own = written(family)
    for field in FIELDS:
        value = said.get(field)
        if value is None:
            continue
        if field in family.reads or own is None or NAMES.get(str(value)) == own:
            return None
        return field, value
    return None
