"""Reads a model directory into memory with mlx-lm and transformers; code that a model brings along is never run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import mlx.core as mx
import mlx.nn as nn
from jinja2.exceptions import TemplateError, TemplateSyntaxError
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.models.cache import make_prompt_cache
from transformers import AutoTokenizer

from adapters.resident.device_check import check_adapters
from adapters.resident.kernel_choice import choose_kernel
from adapters.resident.layers.expert_product import use_expert_product
from adapters.resident.model_layers import adaptable_layers, replaceable_parameters
from adapters.spec import Place, place_of
from rollout_server.engine.messages.options import Embedding, EngineOptions, ModelInfo
from rollout_server.engine.model.attention.choice import by_itself
from rollout_server.engine.model.checkpoint.corrections.activation import written
from rollout_server.engine.model.checkpoint.corrections.feed import set_activation
from rollout_server.engine.model.checkpoint.corrections.norms import norm_by_group, set_eps
from rollout_server.engine.model.checkpoint.corrections.rope import KNOWN, PLAIN, main_part, parts
from rollout_server.engine.model.checkpoint.corrections.routing import lift_biases
from rollout_server.engine.model.checkpoint.corrections.turning import turn_as_said
from rollout_server.engine.model.checkpoint.files import check_model, read_config
from rollout_server.engine.model.checkpoint.plan import Bound, Plan, plan_of
from rollout_server.engine.model.checkpoint.refusals import UNREADABLE, named, refused, unreadable
from rollout_server.engine.model.checkpoint.renames import head_dim
from rollout_server.engine.model.checkpoint.stacked import classes_of, folded_factors
from rollout_server.engine.model.checkpoint.windows import window_bounds
from rollout_server.engine.model.device import rows_turned
from rollout_server.engine.model.digest import base_digest
from rollout_server.engine.model.embedding import find_trunk, read_embedding
from rollout_server.engine.model.footprints import check_room
from rollout_server.engine.model.kv_choice import ChosenStore, choose_store
from rollout_server.engine.model.load_sizes import chosen_sizes, parameters_of
from rollout_server.engine.model.resident import ResidentModel
from rollout_server.engine.model.tasks.heads import Head
from rollout_server.engine.model.tasks.kinds import Kind, check_width, kind_of, read_head, scoring_of, without_output
from rollout_server.engine.model.vision.load import nbytes
from rollout_server.engine.model.vision.sighted import eyes_of, read_tower
from rollout_server.engine.ranks.check import check_cut
from rollout_server.engine.ranks.cut import CutModel, cut, whole
from rollout_server.engine.ranks.ranks import Ranks
from rollout_server.engine.sampling.kernel_choice import choose_filter_kernel
from rollout_server.engine.sampling.sampler_check import check_sampler
from rollout_server.errors import EngineUnavailable
from rollout_server.models.vision.family import VisionFamily

log = logging.getLogger("rollout_server.engine.model")
SAMPLED_ROWS = 12
AROUND: dict[str, str] = {"idefics3": "mistral3", "smolvlm": "mistral3"}
"""Vision models that mlx-lm lacks → the module that takes their text model as it stands in theirs."""
EMBEDDINGS: tuple[Place, ...] = ("embedding", "tied_embedding")


def load(options: EngineOptions, ranks: Ranks | None = None) -> ResidentModel:
    """Reads a model, or this rank's part. Raises `EngineUnavailable` with the cause if there is none that we serve."""
    path, on_cpu = Path(options.model_path), mx.default_device() == mx.cpu
    read = read_model(path, ranks)
    module, config = read.module, read.config
    tower = _prepare(path, module, on_cpu=on_cpu)
    dtype, vocabulary = _activation_dtype(module), _vocabulary(read)
    chosen = _chosen_store(options, read, vocabulary, ranks, on_cpu=on_cpu)
    trunk, width = find_trunk(module, 0 if read.head else vocabulary) or ("", 0)
    part, dtype_name = read.part or whole(module), str(dtype).removeprefix("mlx.core.")
    layers, unfit = part.layers, _check_device(module, part.own, vocabulary, dtype, ranks)
    eyes = eyes_of(tower, path, read.host_tokenizer, module, trunk, chosen, dtype)
    weight_bytes = sum(array.nbytes for array in _arrays(module)) + (0 if eyes is None else nbytes(eyes.family))
    sizes = chosen_sizes(options, chosen, layers, vocabulary, dtype, weight_bytes, ranks)
    info = ModelInfo(
        id=options.model_id,
        digest=base_digest(path),
        model_type=str(config.get("model_type", "unknown")),
        vocab_size=vocabulary,
        max_model_len=_context_length(read, options.context_length),
        dtype=dtype_name,
        quantization=config.get("quantization"),
        eos_token_ids=_end_tokens(config, read.tokenizer, vocabulary),
        parameters=read.parameters,
        weight_bytes=weight_bytes,
        layers=layers,
        weights={} if ranks else replaceable_parameters(module, layers, dtype_name),
        unfit=unfit,
        no_versions=folded_factors(module) or part.unclear,
        ranks=1 if ranks is None else ranks.size,
        kv_bytes_per_token=chosen.cell_bytes,
        kv_bytes_per_row=chosen.cell_bytes * chosen.row_cells,
        kv_bits=options.kv_bits,
        kv_memory=sizes.kv_memory.value,
        cache=chosen.kind,
        embedding=read_embedding(path, config, width) if trunk else Embedding(),
        max_batch=sizes.max_batch.value,
        prefill_tokens=sizes.prefill_tokens.value,
        device=str(mx.default_device()),
        pad_token_id=read.pad_token_id,
        placeholder=None if eyes is None else eyes.family.placeholder,
        **scoring_of(read.kind, read.head, config),
    )
    _check_ranks(path, read, ranks, info)
    kernel = None if ranks or "linear" in unfit else choose_kernel(module, layers, dtype)
    make = partial(chosen.make, sizes.max_batch.value)
    ways = make, chosen.compiles, chosen.attention, kernel, trunk, choose_filter_kernel(vocabulary, dtype)
    return ResidentModel(
        module, read.tokenizer, read.host_tokenizer, dtype, info, *ways, read.head, eyes, part.cuts, ranks
    )


def _check_ranks(path: Path, read: ReadModel, ranks: Ranks | None, info: ModelInfo) -> None:
    """Raises `EngineUnavailable` where several ranks do not compute what one would."""
    if ranks is not None:
        on_cpu = mx.default_device() == mx.cpu
        check_cut(read.module, lambda: _uncut(path, read, on_cpu=on_cpu), ranks, info.vocab_size, info.max_model_len)


def _chosen_store(
    options: EngineOptions, read: ReadModel, vocabulary: int, ranks: Ranks | None, *, on_cpu: bool
) -> ChosenStore:
    """What only reads has no decode steps that could be compiled."""
    wanted = not on_cpu if options.compile_decode is None else options.compile_decode
    agreed = by_itself if ranks is None else ranks.agreed
    store = choose_store(read.module, vocabulary, options, compiles=wanted and read.head is None, agreed=agreed)
    heads = (read.config.get("text_config") or read.config).get("num_attention_heads") or 1
    return replace(store, fits=partial(rows_turned, read.module, heads))


def _check_device(
    module: nn.Module, layers: dict[str, tuple[int, int]], vocabulary: int, dtype: mx.Dtype, ranks: Ranks | None
) -> dict[Place, str]:
    """Kinds of layers on which this device, or that of any rank, computes adapters wrongly, which the log then says.
    Raises `EngineUnavailable` where it samples wrongly, since nothing could be served."""
    if (fault := check_sampler(vocabulary, dtype, SAMPLED_ROWS)) is not None:
        raise EngineUnavailable(
            f"This device does not compute what the sampler asks of it: {fault}. Nothing can be served here; "
            "`rollout-server doctor` says more about the device."
        )
    unfit = check_adapters(module, layers, dtype)
    if ranks is not None:
        # A version that one of them refused would be nowhere, and the others would have it.
        unfit = ranks.union(unfit, get_args(Place))
    for place, why in unfit.items():
        log.error("Adapters on layers of the kind %s are refused: this device computes them wrongly, %s.", place, why)
    return unfit


def _end_tokens(config: dict[str, Any], tokenizer: Any, vocabulary: int) -> tuple[int, ...]:
    """What ends a row: the model's own end tokens (generation config included) and the tokenizer's."""
    own = config.get("eos_token_id")
    ends = {own} if isinstance(own, int) else set(own or ())
    ends |= {tokenizer.eos_token_id} - {None}
    # One outside the logits could never be sampled, and would be written out of bounds where it is banned.
    return tuple(sorted(token for token in ends if 0 <= token < vocabulary))


def _prepare(path: Path, module: nn.Module, *, on_cpu: bool) -> VisionFamily | None:
    """In memory, as it is computed with; returns the tower beside it, if there is one."""
    if on_cpu:
        _to_float32(module)
    _lay_out(module)
    use_expert_product(module)
    module.eval()
    module.freeze()
    mx.eval(module.parameters())
    return read_tower(path, module)


def _lay_out(module: nn.Module) -> None:
    """Stacks of matrices row by row in memory: mlx-lm turns those of some families, and on CUDA MLX's product takes the
    matrices of a turned stack for others. One after another, so that no two copies of the model are there at once."""
    stacks = {path: array for path, array in _named_arrays(module) if array.ndim > 2}
    for path in list(stacks):
        whole = mx.contiguous(stacks.pop(path))
        mx.eval(whole)
        module.update(tree_unflatten([(path, whole)]))


def _to_float32(module: nn.Module) -> None:
    """bf16 and f16 products do not go through BLAS on the CPU. Packed weights and their scales stay as they are,
    except that scales decide the activations' dtype and so become float32 too."""

    def cast(_: str, array: mx.array) -> mx.array:
        return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array

    module.update(tree_map_with_path(cast, module.parameters()))


def _named_arrays(module: nn.Module) -> list[tuple[str, mx.array]]:
    return tree_flatten(module.parameters())  # type: ignore[return-value]


def _arrays(module: nn.Module) -> list[mx.array]:
    return [array for _, array in _named_arrays(module)]


def _activation_dtype(module: nn.Module) -> mx.Dtype:
    """The dtype of norms and scales: what the residual stream and the KV come out in."""
    counts: dict[mx.Dtype, int] = {}
    for array in _arrays(module):
        if mx.issubdtype(array.dtype, mx.floating):
            counts[array.dtype] = counts.get(array.dtype, 0) + 1
    return max(counts, key=lambda dtype: counts[dtype])


def _vocabulary(read: ReadModel) -> int:
    """Width of the logits, which may exceed the tokenizer's vocabulary; rows of the embedding where there are none."""
    module = read.module
    if read.head is not None:
        return max(shape[1] for shape in adaptable_layers(module).values() if place_of(shape) in EMBEDDINGS)
    logits = module(mx.array([[0]], dtype=mx.int32), cache=make_prompt_cache(module))
    return int(logits.shape[-1])


def _context_length(read: ReadModel, asked: int | None) -> int:
    """Tokens of prompt and reply, no more than what the module computes as config.json says. Raises
    `EngineUnavailable` where more is asked for."""
    own = read.max_position_embeddings
    context = (asked or 32768) if own is None else min(own, asked or own)
    bound = min(read.bounds, key=lambda bound: bound.tokens, default=None)
    if bound is None or context <= bound.tokens:
        return context
    if asked is not None:
        raise EngineUnavailable(
            f"--context-length asks for {asked} tokens, but this model is exact up to {bound.tokens}: {bound.reason}."
        )
    log.warning("The context is bounded to %d tokens: %s.", bound.tokens, bound.reason)
    return bound.tokens


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
    kind: Kind
    pad_token_id: int | None
    parameters: int
    """Those of the whole model."""
    head: Head | None = None
    """What scores its hidden states; `module` ends there then."""
    part: CutModel | None = None
    """What of it this rank has; None where there is one."""


def read_model(path: Path, ranks: Ranks | None = None) -> ReadModel:
    """Raises `EngineUnavailable` with the file or the field at fault if the directory cannot be read, or would be
    another model here than it is in transformers."""
    config = read_config(path)
    plan, kind = _planned(path, config), kind_of(config)
    check_model(path)
    check_room(path, parts=1 if ranks is None else ranks.size)
    head = read_head(path, kind, config) if kind.scores else None
    try:
        # No rank reads weights that are another's.
        module, understood = mlx_lm_utils.load_model(
            path, ranks is not None, model_config=plan.overrides, get_model_classes=_classes(plan, head),
            trust_remote_code=False,
        )  # fmt: skip
        parameters = parameters_of(module)
        part = None if ranks is None else cut(module, ranks, config)
        mx.eval(module(mx.array([[0]], dtype=mx.int32), cache=make_prompt_cache(module)))
        bounds = (*plan.bounds, *window_bounds(module, plan.said, plan.family))
        refusal = _as_said(module, plan)
        engine, host = (AutoTokenizer.from_pretrained(path, trust_remote_code=False) for _ in range(2))
    except UNREADABLE as error:
        raise EngineUnavailable(unreadable(path, config, error)) from error
    if refusal is not None:
        raise EngineUnavailable(refused(path, config, [refusal]))
    _check_template(path, host)
    if head is not None:
        check_width(path, module, head)
    longest, pad = plan.said.get("max_position_embeddings"), plan.said.get("pad_token_id")
    longest, pad = (number if isinstance(number, int) else None for number in (longest, pad))
    return ReadModel(module, understood, engine, host, longest, bounds, kind, pad, parameters, head, part)


def _classes(plan: Plan, head: Head | None) -> Callable[[dict[str, Any]], tuple[Any, Any]]:
    """`get_model_classes` of a model, which ends at the hidden states where a head scores them."""
    return classes_of(plan.family) if head is None else without_output(classes_of(plan.family))


def _uncut(path: Path, read: ReadModel, *, on_cpu: bool) -> nn.Module:
    """The same model uncut; its weights are read where they are used."""
    plan = _planned(path, read_config(path))
    module, _ = mlx_lm_utils.load_model(
        path, True, model_config=plan.overrides, get_model_classes=_classes(plan, read.head), trust_remote_code=False
    )
    _as_said(module, plan)
    if on_cpu:
        _to_float32(module)
    module.eval()
    return module


def _planned(path: Path, config: dict[str, Any]) -> Plan:
    if config.get("model_file") is not None:
        raise EngineUnavailable(unreadable(path, config, ValueError("trust_remote_code")))
    try:
        plan = plan_of(config, _served_by(config))
    except EngineUnavailable as error:
        raise EngineUnavailable(f"{named(path, config)} could not be loaded: {error.message}") from None
    except UNREADABLE as error:
        raise EngineUnavailable(unreadable(path, config, error)) from error
    if plan.refusals:
        raise EngineUnavailable(refused(path, config, plan.refusals))
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
    return AROUND | mlx_lm_utils.MODEL_REMAPPING | special


def _as_said(module: nn.Module, plan: Plan) -> str | None:
    """Mends what the module does otherwise than config.json says; half a sentence for what cannot be mended."""
    own = written(plan.family)
    if plan.activation is not None and own is not None:
        if (refusal := set_activation(module, own, *plan.activation)) is not None:
            return refusal
        log.info("The feed-forward layers have %s = %s, as config.json says.", *plan.activation)
    if count := norm_by_group(module, plan.said, plan.family.name):
        log.info("%d norms are taken over groups, as config.json says.", count)
    if count := set_eps(module, plan.family.name):
        log.info("%d norms have the eps that transformers has there, and not that of mlx-lm's class.", count)
    if count := lift_biases(module, plan.said):
        log.info("%d routers have biases below zero lifted: mlx-lm's would choose experts of groups left out.", count)
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
