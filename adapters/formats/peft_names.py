"""What transformers calls the layers of a base, where mlx-lm calls them otherwise.

Most families have the same names in both. The rest differ by the rules below; each rule offers the spellings that
releases of transformers have used, and a file's own tensors tell which of them it means.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from adapters.spec import ExpertsShape, experts_of

RULES: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...] = (
    # The text model inside one that also sees, and as older releases called it.
    (re.compile(r"^language_model\.model\."), ("model.language_model.", "language_model.model.", "model.text_model.")),
    (re.compile(r"^language_model\.lm_head$"), ("lm_head", "language_model.lm_head")),
    # Mixtral's block, which transformers 5 renamed.
    (re.compile(r"\.block_sparse_moe\."), (".block_sparse_moe.", ".mlp.")),
)
"""(What mlx-lm writes, the spellings that files may use; the first is what is exported.)"""
STACK = re.compile(r"(.+)\.(switch_mlp|experts)\.(gate_proj|up_proj|down_proj)")
EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.[^.]+")
WITHIN_EXPERTS = re.compile(r"(.+\.experts)(?:\.base_layer)*|(.+\.experts)\.\d+\.[^.]+")
MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@dataclass(frozen=True, slots=True)
class Block:
    """The stacked experts of one layer of the base."""

    base: str
    """mlx-lm's path."""
    name: str
    """transformers' path."""
    shapes: Mapping[str, ExpertsShape]
    """Shapes by mlx-lm's name: `gate_proj`, `up_proj`, `down_proj`."""
    interleaved: bool
    """True where gate and up take turns in `gate_up_proj`; else gate comes first."""

    @property
    def experts(self) -> int:
        return next(iter(self.shapes.values())).experts

    def one(self, part: str, expert: int) -> str:
        """The path of one expert's layer, in releases of transformers where each is a module of its own."""
        return f"{self.name}.{expert}.{MIXTRAL[part] if '.block_sparse_moe.' in self.base else part}"


@dataclass(frozen=True, slots=True)
class Names:
    """`layers` and `blocks` are those of the base under a file's names; `base` leads back."""

    layers: Mapping[str, Any]
    blocks: tuple[Block, ...]
    base: Mapping[str, str]


def names_in(layers: Mapping[str, tuple[int, int]], modules: Collection[str]) -> Names:
    """How a file with tensors for `modules` calls the base's `layers`."""
    chosen = [(pattern, spellings[0]) for pattern, spellings in RULES]
    seen = set(modules) | {next(filter(None, m.groups())) for m in map(WITHIN_EXPERTS.fullmatch, modules) if m}
    for index, (pattern, spellings) in enumerate(RULES):
        if not any(pattern.search(path) for path in layers):
            continue

        def met(spelling: str, index: int = index, pattern: re.Pattern[str] = pattern) -> int:
            rules = [*chosen[:index], (pattern, spelling), *chosen[index + 1 :]]
            return len(seen & {_container(_spelt(path, rules)) for path in layers})

        chosen[index] = (pattern, max(spellings, key=met))
    base = {_spelt(path, chosen): path for path, shape in layers.items() if not experts_of(shape)}
    return Names({name: layers[path] for name, path in base.items()}, _blocks(layers, chosen), base)


def exported(path: str) -> str:
    """What transformers calls this layer of the base."""
    return _spelt(path, [(pattern, spellings[0]) for pattern, spellings in RULES])


def _spelt(path: str, rules: list[tuple[re.Pattern[str], str]]) -> str:
    for pattern, spelling in rules:
        path = pattern.sub(spelling, path)
    return path


def _container(path: str) -> str:
    """For a stack the path of its block, as transformers calls it; for another layer its own path."""
    match = STACK.fullmatch(path)
    return f"{match[1]}.experts" if match else path


def _blocks(layers: Mapping[str, tuple[int, int]], rules: list[tuple[re.Pattern[str], str]]) -> tuple[Block, ...]:
    found: dict[str, dict[str, ExpertsShape]] = {}
    for path, shape in layers.items():
        match = STACK.fullmatch(path)
        if match and isinstance(shape, ExpertsShape) and (match[2] == "switch_mlp" or _gpt_oss(match[1], layers)):
            found.setdefault(f"{match[1]}.{match[2]}", {})[match[3]] = shape
    return tuple(
        Block(path, _container(_spelt(f"{path}.up_proj", rules)), shapes, path.endswith(".experts"))
        for path, shapes in sorted(found.items())
        if len(shapes) == 3
    )


def _gpt_oss(parent: str, layers: Mapping[str, tuple[int, int]]) -> bool:
    """Among the families that call a block `experts`, gpt-oss alone keeps it in `mlp` beside a linear `router`; its
    gate and up take turns. The order in the others is not known here, so they are not served in this form."""
    return parent.endswith(".mlp") and f"{parent}.router" in layers
