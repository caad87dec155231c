"""What a model directory is for: config.json and the names of its tensors say whether it generates or scores, and where
its head is. What is not known is refused by name, and never served as something else."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from rollout_server.engine.messages.options import Activation, Task
from rollout_server.engine.model.checkpoint.files import WEIGHTS
from rollout_server.engine.model.embedding import trunk_places
from rollout_server.engine.model.tasks.heads import HEADS, Head, head_of
from rollout_server.errors import EngineUnavailable
from rollout_server.quoting import quoted

TASKS: Mapping[str, Task] = {
    "CausalLM": "generate",
    "ConditionalGeneration": "generate",
    "SequenceClassification": "classify",
    "TokenClassification": "token_classify",
}
"""What stands behind `For` in the names of transformers' classes."""
QWEN_REWARDS: Mapping[str, Task] = {"Qwen2ForRewardModel": "classify", "Qwen2ForProcessRewardModel": "token_classify"}
"""Classes that come as code of the repository, which is never run: a head of two layers on qwen2."""
LANGUAGE_MODEL = re.compile(r"\w+LMHeadModel")
"""Decoders of transformers whose names lack `For`, such as GPT2LMHeadModel. In others of that kind, LlamaRewardModel or
MistralModel, something else stands behind the hidden states, or nothing."""
OUTPUT_LAYERS = ("lm_head", "output", "embed_out")
ACTIVATIONS: Mapping[str, Activation] = {"Identity": "none", "Sigmoid": "sigmoid", "Softmax": "softmax"}
"""Modules of torch that sentence-transformers writes into config.json."""
PROBLEMS: Mapping[str, Activation] = {"regression": "none", "multi_label_classification": "sigmoid"}
UNNAMED = re.compile(r"LABEL_\d+")


@dataclass(frozen=True, slots=True)
class Kind:
    """What the first name of `architectures` says."""

    task: Task
    architecture: str
    """Empty where config.json names none, as files of mlx-lm may."""

    @property
    def scores(self) -> bool:
        """True where it has a head of its own and no output layer over the vocabulary."""
        return self.task in ("classify", "token_classify")


def kind_of(config: Mapping[str, Any]) -> Kind:
    """Raises `EngineUnavailable` for a class whose head is not known here."""
    named = config.get("architectures") or ()
    names = (named,) if isinstance(named, str) else tuple(named)
    name = str(names[0]) if names else ""
    if (task := QWEN_REWARDS.get(name)) is not None:
        return Kind(task, name)
    if not name or LANGUAGE_MODEL.fullmatch(name):
        return Kind("generate", name)
    match = re.fullmatch(r".+?For([A-Z]\w*)", name)
    task = TASKS.get(match[1]) if match else None
    if task is None:
        raise EngineUnavailable(
            f"config.json names the architecture {quoted(name)}, and what it computes behind its hidden states is not "
            f"known here: served are classes for {', '.join(TASKS)}, decoders called …LMHeadModel, and "
            f"{' and '.join(QWEN_REWARDS)}."
        )
    return Kind(task, name)


def read_head(directory: Path, kind: Kind, config: Mapping[str, Any]) -> Head:
    """The head beside the body's weights. Raises `EngineUnavailable` where there is none, or one that is not known."""
    found: dict[str, mx.array] = {}
    for path in sorted(directory.glob(WEIGHTS)):
        tensors: dict[str, mx.array] = mx.load(str(path))  # type: ignore[assignment]  # A safetensors file is a dictionary.
        found |= {name: array for name, array in tensors.items() if is_head(name)}
    if not found:
        raise EngineUnavailable(
            f"{directory} is to be a {kind.architecture}, but has no score.weight or classifier.weight: take the files "
            "that training wrote, or name the decoder's own class in config.json's architectures."
        )
    head = head_of(found)
    shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in sorted(found.items()))
    if head is None or (len(head.layers) == 2) != (kind.architecture in QWEN_REWARDS):
        raise EngineUnavailable(f"The head of {directory} ({shapes}) is none that a {kind.architecture} has.")
    field, said = _labels_said(config)
    if said not in (None, head.labels) and kind.architecture not in QWEN_REWARDS:
        raise EngineUnavailable(
            f"config.json of {directory} has {said} labels in {field}, and its head ({shapes}) scores "
            f"{head.labels}: mend config.json."
        )
    mx.eval([array for layer in head.layers for array in layer if array is not None])
    return head


def _labels_said(config: Mapping[str, Any]) -> tuple[str, int | None]:
    """(The field, how many labels it says there are): transformers takes names before a number. None where neither is
    there, which in config.json means two labels or a class that leaves them to its head."""
    named, count = config.get("id2label"), config.get("num_labels")
    if isinstance(named, Mapping):
        return "id2label", len(named)
    return "num_labels", count if isinstance(count, int) else None


def check_width(directory: Path, module: nn.Module, head: Head) -> None:
    """Raises `EngineUnavailable` unless the head reads states as wide as those that the body gives."""
    width = module(mx.array([[0]], dtype=mx.int32), cache=make_prompt_cache(module)).shape[-1]
    if width != head.width:
        raise EngineUnavailable(
            f"The head of {directory} reads {head.width} values, and its hidden states have {width}: they are not of "
            "one model."
        )


def is_head(name: str) -> bool:
    """True where a checkpoint's tensor belongs to its head."""
    return name.partition(".")[0] in HEADS


def scoring_of(kind: Kind, head: Head | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ModelInfo` that say what a model gives."""
    if head is None:
        return {"task": kind.task}
    return {
        "task": kind.task,
        "labels": labels_of(config, head.labels),
        "activation": activation_of(config, head.labels),
    }


def labels_of(config: Mapping[str, Any], count: int) -> tuple[str | None, ...]:
    """The names of labels; None for those that are only numbered."""
    named = config.get("id2label")
    names = [named.get(str(at)) for at in range(count)] if isinstance(named, Mapping) else [None] * count
    return tuple(None if name is None or UNNAMED.fullmatch(str(name)) else str(name) for name in names)


def activation_of(config: Mapping[str, Any], labels: int) -> Activation:
    """What vLLM makes probabilities with: what sentence-transformers wrote for a cross-encoder, else what the problem
    is, else a sigmoid for one label and a softmax for more. Raises `EngineUnavailable` for a function of torch that is
    not known here."""
    own = config.get("sentence_transformers")
    said = own.get("activation_fn") if isinstance(own, Mapping) else None
    said = said or config.get("sbert_ce_default_activation_function")
    if said is not None:
        name = str(said).rpartition(".")[2].partition("(")[0]
        if name not in ACTIVATIONS:
            raise EngineUnavailable(
                f"config.json wants the activation {quoted(said)}; known are {', '.join(ACTIVATIONS)} of torch."
            )
        return ACTIVATIONS[name]
    return PROBLEMS.get(str(config.get("problem_type")), default_activation(labels))


def default_activation(labels: int) -> Activation:
    """For a head of which nothing is said."""
    return "sigmoid" if labels == 1 else "softmax"


def without_output(classes: Callable[[dict[str, Any]], tuple[Any, Any]]) -> Callable[[dict[str, Any]], tuple[Any, Any]]:
    """`get_model_classes` of the same families that ends at the hidden states: their output layer, which such files
    lack, is taken away, and tensors of the head are left to `read_head`."""

    def chosen(config: dict[str, Any]) -> tuple[Any, Any]:
        family, arguments = classes(config)

        class Body(family):  # type: ignore[valid-type,misc]
            def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
                return attrgetter(_trunk(self))(self)(inputs, cache=cache)

            def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
                kept = {name: array for name, array in weights.items() if not is_head(name)}
                # The family's own may look for its output layer, so that it goes last.
                kept = super().sanitize(kept) if hasattr(family, "sanitize") else kept
                place = _trunk(self)
                *above, _ = place.split(".")
                owner: nn.Module = attrgetter(".".join(above))(self) if above else self
                gone = [name for name in OUTPUT_LAYERS if owner.pop(name, None) is not None]
                prefixes = {".".join([*above, name, ""]) for name in (*gone, "lm_head")}
                prefixes |= {f"{place}.{name}." for name in _passing_on(attrgetter(place)(self))}
                return {name: array for name, array in kept.items() if not name.startswith(tuple(prefixes))}

        return Body, arguments

    return chosen


def _passing_on(trunk: nn.Module) -> list[str]:
    """The output layers that a family has within the part that is read (gpt_neox), which pass hidden states on now."""
    found = [name for name in OUTPUT_LAYERS if isinstance(trunk.get(name), nn.Linear | nn.Identity)]
    for name in found:
        trunk[name] = nn.Identity()
    return found


def _trunk(module: nn.Module) -> str:
    found = next(trunk_places(module), None)
    if found is None:
        raise ValueError("mlx-lm's class has no part that ends at the hidden states")
    return found
