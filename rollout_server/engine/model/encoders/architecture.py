"""Which encoder a directory holds, and what for: found from config.json, and never guessed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout_server.engine.messages.options import Task
from rollout_server.engine.model.embedding import MODULES
from rollout_server.errors import EngineUnavailable
from rollout_server.models.encoders.families import ENCODERS, EncoderFamily
from rollout_server.quoting import quoted

TASKS: Mapping[str, Task] = {
    "Model": "embed",
    "ForSequenceClassification": "classify",
    "ForTokenClassification": "token_classify",
}
"""What stands behind the family's name in those of transformers' classes."""
PRETRAINED = ("ForMaskedLM", "ForPreTraining")
"""Classes whose body sentence-transformers takes, and leaves the head."""


@dataclass(frozen=True, slots=True)
class Architecture:
    family: EncoderFamily
    task: Task


def is_encoder(config: Mapping[str, Any]) -> bool:
    """True where config.json is that of an encoder, served or refused."""
    return config.get("model_type") in ENCODERS


def architecture_of(config: Mapping[str, Any], directory: Path) -> Architecture:
    """For a configuration that `is_encoder`. Raises `EngineUnavailable` for a class that is not served."""
    kind = str(config["model_type"])
    family = ENCODERS[kind]
    named = config.get("architectures") or ()
    names = (named,) if isinstance(named, str) else tuple(str(name) for name in named)
    sentences = (directory / MODULES).is_file()
    for name in names:
        rest = name.removeprefix(family.architecture) if name.startswith(family.architecture) else ""
        if (task := TASKS.get(rest)) is not None:
            return Architecture(family, task)
        if rest in PRETRAINED and sentences:
            return Architecture(family, "embed")
    if not names and sentences:
        return Architecture(family, "embed")
    served = ", ".join(family.architecture + rest for rest in TASKS)
    told = f"names the architecture {quoted(names[0])}" if names else "names no architecture"
    raise EngineUnavailable(
        f"The model at {directory} ({kind}) {told}. Served are {served}; a masked language model is served for its "
        f"vectors where sentence-transformers' {MODULES} lies beside it."
    )
