"""What torch writes into the names of a model that is compiled, data-parallel, sharded or checkpointed. It says nothing
about the layers, so it is left out of what is sent: the digest is of the layers' own names. The server reads names
in the same way (`adapters/wrappers.py`)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeVar

OWN = r"_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"
IN_NAMES = re.compile(rf"(?:^|(?<=\.))(?:{OWN}|module)\.")
"""Wrappers in names of tensors. No model of mlx-lm has a part that is called `module`."""
IN_PATTERNS = re.compile(rf"(?:{OWN})\\?\.")
"""Wrappers in patterns, with their dots escaped or not."""
FIELDS = ("target_modules", "exclude_modules", "target_parameters", "modules_to_save", "rank_pattern", "alpha_pattern")
"""The fields of PEFT's configuration that name layers."""

T = TypeVar("T")


def unwrapped(tensors: Mapping[str, T]) -> dict[str, T]:
    """The same tensors under the layers' own names; two that would then have one name keep theirs."""
    bare = {name: unwrapped_name(name) for name in tensors}
    count = Counter(bare.values())
    return {bare[name] if count[bare[name]] == 1 else name: tensor for name, tensor in tensors.items()}


def unwrapped_name(name: str) -> str:
    return IN_NAMES.sub("", name)


def unwrapped_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """An adapter's configuration that names layers in the same way."""
    return {name: _bare(value) if name in FIELDS else value for name, value in config.items()}


def _bare(value: Any) -> Any:
    match value:
        case str():
            return IN_PATTERNS.sub("", value)
        case list():
            return [_bare(name) for name in value]
        case dict():
            return {_bare(name): number for name, number in value.items()}
    return value
