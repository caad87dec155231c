"""What rank 0 says to the others besides decisions: how to start, and every command of the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.messages.rollouts import Command
from rollout_server.fleet.codec.frames import Codec
from rollout_server.fleet.codec.values import Compile
from rollout_server.grammar import Constraint, Grammar


@dataclass(frozen=True, slots=True)
class Begin:
    """The first word: which engine this is a rank of."""

    options: EngineOptions


def rank_codec(compile: Compile) -> Codec:
    """The codec of both sides; `compile` makes grammars ready."""
    return Codec((Begin, *get_args(Command)), compile)


def uncompiled(grammar: Grammar) -> Constraint:
    """Rank 0 reads no commands."""
    raise TypeError("Rank 0 takes no grammar from another rank.")
