"""Reads a model directory into memory with mlx-lm and transformers, so that it computes what config.json means. Code
that a model brings along is never run."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from jinja2.exceptions import TemplateError, TemplateSyntaxError
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.models.cache import make_prompt_cache
from transformers import AutoTokenizer

from rollout_server.engine.checkpoint.activation import written
from rollout_server.engine.checkpoint.feed import set_activation
from rollout_server.engine.checkpoint.files import check_model, read_config
from rollout_server.engine.checkpoint.grouped import norm_by_group
from rollout_server.engine.checkpoint.plan import Bound, Plan, plan_of
from rollout_server.engine.checkpoint.renames import head_dim
from rollout_server.engine.checkpoint.rope import KNOWN, PLAIN, main_part, parts
from rollout_server.engine.checkpoint.stacked import classes_of
from rollout_server.engine.checkpoint.turning import turn_as_said
from rollout_server.engine.checkpoint.windows import window_bounds
from rollout_server.errors import EngineUnavailable

log = logging.getLogger(__name__)

REASON = 400
"""Characters shown of an error: mlx-lm lists every parameter that is missing."""
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    ImportError,
    AttributeError,
    RuntimeError,
    IndexError,
    ZeroDivisionError,
    AssertionError,
)
"""What mlx-lm, transformers and the libraries below them raise for files that they do not expect."""


@dataclass(frozen=True, slots=True, eq=False)
class ReadModel:
    """What a model directory became."""

    module: nn.Module
    config: dict[str, Any]
    """As mlx-lm understood it, the generation config's end tokens included."""
    tokenizer: Any
    host_tokenizer: Any
    """A second one: a tokenizer is not to be shared between threads."""
    max_position_embeddings: int | None
    bounds: tuple[Bound, ...]
    """Up to how many tokens the module is what config.json means."""


def read_model(path: Path) -> ReadModel:
    """Raises `EngineUnavailable` with the file or the field at fault if the directory cannot be read, or would be
    another model here than it is in transformers."""
    config = read_config(path)
    plan = _planned(path, config)
    check_model(path)
    try:
        module, understood = mlx_lm_utils.load_model(
            path, model_config=plan.overrides, get_model_classes=classes_of(plan.family), trust_remote_code=False
        )
        mx.eval(module(mx.array([[0]], dtype=mx.int32), cache=make_prompt_cache(module)))
        bounds = (*plan.bounds, *window_bounds(module, plan.said, plan.family))
        refusal = _as_said(module, plan)
        engine, host = (AutoTokenizer.from_pretrained(path, trust_remote_code=False) for _ in range(2))
    except UNREADABLE as error:
        raise EngineUnavailable(_sentence(path, config, error)) from error
    if refusal is not None:
        raise EngineUnavailable(_refused(path, config, [refusal]))
    _check_template(path, host)
    longest = plan.said.get("max_position_embeddings")
    return ReadModel(module, understood, engine, host, longest if isinstance(longest, int) else None, bounds)


def _planned(path: Path, config: dict[str, Any]) -> Plan:
    if config.get("model_file") is not None:
        raise EngineUnavailable(_sentence(path, config, ValueError("trust_remote_code")))
    try:
        plan = plan_of(config, _served_by(config))
    except EngineUnavailable as error:
        raise EngineUnavailable(f"{_named(path, config)} could not be loaded: {error.message}") from None
    except UNREADABLE as error:
        raise EngineUnavailable(_sentence(path, config, error)) from error
    if plan.refusals:
        raise EngineUnavailable(_refused(path, config, plan.refusals))
    return plan


def _served_by(config: Mapping[str, Any]) -> dict[str, str]:
    """mlx-lm's tables of model types that another module serves."""
    named = config.get("architectures") or ()
    architectures = (named,) if isinstance(named, str) else named
    special = {
        kind: module
        for (kind, architecture), module in mlx_lm_utils.MODEL_ARCHITECTURE_REMAPPING.items()
        if architecture in architectures
    }
    return mlx_lm_utils.MODEL_REMAPPING | special


def _as_said(module: nn.Module, plan: Plan) -> str | None:
    """Mends what the module does otherwise than config.json says; half a sentence for what cannot be mended."""
    own = written(plan.family)
    if plan.activation is not None and own is not None:
        if (refusal := set_activation(module, own, *plan.activation)) is not None:
            return refusal
        log.info("The feed-forward layers have %s = %s, as config.json says.", *plan.activation)
    if count := norm_by_group(module, plan.said, plan.family.name):
        log.info("%d norms are taken over groups, as config.json says.", count)
    return _turned(module, plan)


def _turned(module: nn.Module, plan: Plan) -> str | None:
    rope, kinds = plan.said.get("rope_parameters"), plan.said.get("layer_types")
    if not isinstance(rope, dict) or any(part.get("rope_theta") is None for part in parts(rope)):
        return None
    longest = plan.said.get("max_position_embeddings")
    try:
        turned = turn_as_said(module, rope, kinds, head_dim(plan.said), longest if isinstance(longest, int) else None)
    except KeyError as error:
        return f"RoPE of type {main_part(rope).get('rope_type')} lacks {error.args[0]} in config.json"
    if turned.replaced:
        log.info("%d layers turn positions as config.json says, and not as mlx-lm's class does.", turned.replaced)
    kinds_of_rope = {str(part.get("rope_type", "default")) for part in parts(rope)}
    strange = kinds_of_rope - KNOWN if turned.checked else kinds_of_rope - PLAIN
    if strange:
        return f"rope_type is {', '.join(sorted(strange))}, which mlx-lm's {plan.family.name} does not compute"
    return None


def _check_template(path: Path, tokenizer: Any) -> None:
    """Without a template everything but chat works, so that one is no reason not to start."""
    if not tokenizer.chat_template:
        return
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    except TemplateSyntaxError as error:
        log.warning(
            "The chat template of %s cannot be read (line %s: %s): /v1/chat/completions refuses everything.",
            path, error.lineno, error.message,
        )  # fmt: skip
    except (TemplateError, *UNREADABLE):
        log.debug("The chat template of %s does not take one message of a user.", path)


def _named(path: Path, config: Mapping[str, Any]) -> str:
    return f"The model at {path} ({config.get('model_type', 'no model_type')})"


def _refused(path: Path, config: Mapping[str, Any], faults: list[str] | tuple[str, ...]) -> str:
    listed = "; ".join(faults)
    return f"{_named(path, config)} would not be here what it is in transformers: {listed}."


def _sentence(path: Path, config: dict[str, Any], error: Exception) -> str:
    named = _named(path, config)
    if "trust_remote_code" in str(error):
        return (
            f"{named} needs code of its own to be run, which this server never does: take a model of a family that "
            "mlx-lm and transformers know, or a copy without custom code."
        )
    reason = " ".join(str(error).split())
    reason = reason if len(reason) <= REASON else f"{reason[:REASON]}…"
    if isinstance(error, KeyError | AttributeError | TypeError) or not reason:
        reason = f"{type(error).__name__}: {reason}"
    return f"{named} could not be loaded: {reason.removesuffix('.')}.{_perhaps(path, config)}"


def _perhaps(path: Path, config: dict[str, Any]) -> str:
    """What about the model may be the cause, when the error does not say so itself."""
    packing = config.get("quantization_config")
    method = packing.get("quant_method") if isinstance(packing, dict) else None
    said = "" if method is None else f" Its weights are packed by {method}, of which mlx-lm reads a part only."
    if "auto_map" in config or "auto_map" in _read(path / "tokenizer_config.json"):
        said += " It brings code of its own, which this server never runs."
    return said


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
