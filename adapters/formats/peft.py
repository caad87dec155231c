"""The file format of PEFT: adapter_config.json with `peft_type`, tensors `base_model.model.<path>.lora_A.weight`.

What the fields mean is taken from PEFT itself (huggingface/peft, tuners/lora and tuners/tuners_utils). A field that
is not known here and not neutral is refused by name, since it may change the numbers.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from adapters.bundle import NO_PARAMETERS, AdapterBundle
from adapters.errors import AdapterUnreadable, AdapterUnsupported, shown
from adapters.faults import Fault
from adapters.formats.bounded_regex import Patterns, PatternTable
from adapters.formats.fit import Proposal, twice
from adapters.formats.heads import TASK_TYPES, saved_modules, task_type_of
from adapters.formats.peft_experts import PARAMETERS, Parts, Stacks, joined, of_each_expert, of_parameters
from adapters.formats.peft_names import EXPERT, Names, exported, names_in
from adapters.formats.peft_saved_modules import EMBEDDINGS, NOTHING_SAVED, is_head, saved_in
from adapters.spec import (
    DENSE_KINDS,
    MAGNITUDE,
    MAX_RANK,
    NO_SCORING,
    AdapterSpec,
    Kind,
    ModuleSpec,
    Parameter,
    Place,
    Scoring,
    ends,
    fields_shown,
    lora_scale,
    place_of,
    quoted,
)
from adapters.tensors import AdapterTensor, FileTensor, write_safetensors

TENSORS = (
    re.compile(r"(?:base_model\.model\.)?(.+)\.(lora_[AB])(?:\.([^.]+))?\.weight"),
    re.compile(r"(?:base_model\.model\.)?(.+)\.(lora_embedding_[AB])(?:\.([^.]+))?"),
    re.compile(r"(?:base_model\.model\.)?(.+)\.(lora_magnitude_vector)(?:\.(?!weight$)([^.]+))?(?:\.weight)?"),
)
"""Layer, part, and the adapter's name where a file keeps it."""
READ = frozenset(
    {"peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "rank_pattern"}
    | {"alpha_pattern", "layers_to_transform", "layers_pattern", "init_lora_weights", "kind", "use_dora"}
    | {"target_parameters", "modules_to_save"}
)
WITHOUT_EFFECT = frozenset(
    {"auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "lora_dropout"}
    | {"peft_version", "runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config"}
    | {"megatron_core", "qalora_group_size", "fan_in_fan_out"}
)
"""Book-keeping, training, initialisation and how torch stores the base: what an adapter computes does not depend on
them, A and B being [rank, in] and [out, rank] in any case."""
MEANT = READ | WITHOUT_EFFECT
NEUTRAL: dict[str, tuple[Any, ...]] = {"bias": (None, "none")}
REASONS = {
    "bias": "Trained biases are not served: train with bias 'none'.",
    "lora_bias": "lora_bias is not served: train without a bias on B.",
    "trainable_token_indices": "trainable_token_indices (trained embedding rows) is not served.",
}
BLOCK = re.compile(r".*?\.[^.]*\.(\d+)\.")
TRAINED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
INITIALISATIONS = ("gaussian", "eva", "orthogonal")


def read(
    tensors: Mapping[str, FileTensor],
    config: Mapping[str, Any],
    layers: Mapping[str, tuple[int, int]],
    parameters: Mapping[str, Parameter],
    scoring: Scoring = NO_SCORING,
) -> Proposal:
    """What the file says about the layers of a base (path → (out, in)) and its parameters. Raises `AdapterUnreadable`
    where the configuration is not usable and `AdapterUnsupported` with everything in it that is not served."""
    refuse(config)
    thin = {name: match for name in sorted(tensors) if (match := _thin(name))}
    parts, strangers = _parts(thin, tensors)
    names = names_in(layers, {module for module, _ in parts})
    modules, stacks = _modules(config, names, parts)
    if stacks.modules and _flag(config, "use_dora"):
        raise AdapterUnsupported({"use_dora": "DoRA on stacked experts is not served: leave the experts out."})
    modules = {names.base[name]: spec for name, spec in modules.items()} | stacks.modules
    parts = {(names.base.get(name, name), part): tensor for (name, part), tensor in parts.items()} | stacks.tensors
    kept = _names(config, "modules_to_save") or frozenset()
    wanted = [kept] if isinstance(kept, str) else sorted(kept)
    saved = NOTHING_SAVED
    if wanted or len(thin) < len(tensors) or str(config.get("task_type")) in TASK_TYPES:
        others = {name: tensor for name, tensor in tensors.items() if name not in thin}
        saved = saved_in(others, wanted, config, names, modules, layers, parameters, scoring)
    kind: Kind = "dora" if _flag(config, "use_dora") else "lora"
    return Proposal(
        spec=AdapterSpec(kind, modules, tuple(saved.dense), tuple(saved.head.tensors), saved.head.task),
        targets=lambda: f"target_modules = {quoted(config.get('target_modules'))}",
        tensors=parts,
        strangers=(*strangers, *saved.strangers, *stacks.faults, *saved.faults),
        transposed=False,
        spell=_spell,
        dense=saved.dense,
        promised=saved.promised,
        promises="modules_to_save names its module",
        head=saved.head,
    )


def complete(spec: AdapterSpec, tensors: dict[str, AdapterTensor]) -> tuple[AdapterSpec, dict[str, AdapterTensor]]:
    """The file says everything: an embedding's adapter leaves a head that shares its weight alone, as PEFT does."""
    return spec, tensors


def _spell(part: str, place: Place) -> str:
    if part == MAGNITUDE:
        return part
    return part.replace("lora", "lora_embedding") if place in EMBEDDINGS else f"{part}.weight"


def refuse(config: Mapping[str, Any]) -> None:
    """Raises `AdapterUnsupported` for what would change the numbers and is not served."""
    refusals: dict[str, str] = {}
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        refusals["peft_type"] = f"peft_type {quoted(config['peft_type'])} is not served: send LORA."
    wrong = [
        field
        for field, value in config.items()
        if field not in MEANT and (value not in NEUTRAL[field] if field in NEUTRAL else value)
    ]
    refusals |= {field: REASONS[field] for field in wrong if field in REASONS}
    if unknown := {field: config[field] for field in wrong if field not in REASONS}:
        rest = ("is no field", "leave it out") if len(unknown) == 1 else ("are no fields", "leave them out")
        default = f"{fields_shown(unknown)} {rest[0]} of LoRA that is served: {rest[1]} or neutral."
        refusals |= dict.fromkeys(unknown, default)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(TRAINED_BASE):
        refusals["init_lora_weights"] = (
            f"init_lora_weights {quoted(start)} trains against a changed base: save the adapter with "
            "path_initial_model_for_weight_conversion, which makes it an ordinary LoRA."
        )
    elif not isinstance(start, bool | None) and not (isinstance(start, str) and start.lower() in INITIALISATIONS):
        refusals["init_lora_weights"] = f"init_lora_weights {quoted(start)} is not known: is the base unchanged by it?"
    if refusals:
        raise AdapterUnsupported(refusals)


def _thin(name: str) -> re.Match[str] | None:
    """The match of a low-rank tensor's name."""
    for pattern in TENSORS:
        if match := pattern.fullmatch(name):
            return match
    return None


def _parts(
    thin: Mapping[str, re.Match[str]], tensors: Mapping[str, FileTensor]
) -> tuple[dict[tuple[str, str], FileTensor], list[Fault]]:
    """(Tensors by module and part, faults) of names that `_thin` matches."""
    parts: dict[tuple[str, str], FileTensor] = {}
    strangers: list[Fault] = []
    adapters: set[str] = set()
    for name, match in thin.items():
        module, part, adapter = match.groups()
        part = part.replace("lora_embedding", "lora")
        if (module, part) in parts:
            strangers.append(twice(name, parts[module, part]))
        parts[module, part] = tensors[name]
        adapters.add(adapter or "")
    if len(adapters - {""}) > 1:
        raise AdapterUnreadable(
            f"The file holds {len(adapters)} adapters ({shown(', '.join(sorted(adapters)))}): send one at a time.",
            field="weights",
        )
    return parts, strangers


def _modules(config: Mapping[str, Any], names: Names, parts: Parts) -> tuple[dict[str, ModuleSpec], Stacks]:
    """(The layers that the configuration targets under the file's names, stacks of experts under the base's): rank and
    scale of each. What belongs to the stacks is taken out of `parts`."""
    rank = _positive(config.get("r"), "r")
    alpha = _number(config.get("lora_alpha"), "lora_alpha")
    stabilised = _flag(config, "use_rslora")
    patterns = Patterns()
    ranks = {k: _positive(v, "rank_pattern") for k, v in _table(config, "rank_pattern").items()}
    alphas = {k: _number(v, "alpha_pattern") for k, v in _table(config, "alpha_pattern").items()}
    own_rank = PatternTable(ranks, patterns) if ranks else None
    own_alpha = PatternTable(alphas, patterns) if alphas else None
    scales: dict[tuple[float, int], float] = {}

    def spec(key: str, place: Place) -> ModuleSpec:
        r = own_rank.first(key, rank) if own_rank else rank
        a = own_alpha.first(key, alpha) if own_alpha else alpha
        if (a, r) not in scales:
            scales[a, r] = lora_scale(a, r, rank_stabilised=stabilised)
        return ModuleSpec(r, scales[a, r], place)

    layers = {**names.layers, **_experts(names, parts)}
    modules = {path: spec(path, place_of(layers[path])) for path in _targets(config, layers, patterns)}
    stacks = [of_each_expert(block, modules, parts) for block in names.blocks]
    wanted = _names(config, "target_parameters") or frozenset()
    if isinstance(wanted, str):
        raise AdapterUnreadable("target_parameters must be a list of names.", field="config.target_parameters")
    for path, shape in names.layers.items() if wanted else ():
        if place_of(shape) == "linear" and _named(wanted, f"{path}.weight", patterns):
            modules[path] = spec(f"{path}.weight", "linear")
    for block in names.blocks:
        keys = {name: f"{block.name}.{name}" for name in PARAMETERS if _named(wanted, f"{block.name}.{name}", patterns)}
        stacks.append(of_parameters(block, {name: spec(key, "experts") for name, key in keys.items()}, parts))
    return modules, joined(stacks) if stacks else Stacks()


def _experts(names: Names, parts: Parts) -> dict[str, tuple[int, int]]:
    """The experts' own layers, where the file has some: in transformers before 5 each was a module."""
    if not any(EXPERT.fullmatch(module) for module, _ in parts):
        return {}
    return {
        block.one(part, expert): (shape[0], shape[1])
        for block in names.blocks
        for part, shape in block.shapes.items()
        for expert in range(block.experts)
    }


def _targets(config: Mapping[str, Any], layers: Mapping[str, tuple[int, int]], patterns: Patterns) -> list[str]:
    """PEFT's rule: a string is an expression for the whole path, or `all-linear`; a list, paths or their ends."""
    wanted = _names(config, "target_modules")
    if not wanted and config.get("target_parameters"):
        return []
    if not wanted:
        raise AdapterUnreadable(
            "target_modules is missing from the adapter configuration: name the adapted layers, as PEFT saves them.",
            field="config.target_modules",
        )
    excluded = _names(config, "exclude_modules") or frozenset()
    paths = [path for path in layers if not (excluded and _named(excluded, path, patterns))]
    indices = config.get("layers_to_transform")
    if isinstance(wanted, str):
        if indices is not None or config.get("layers_pattern"):
            raise AdapterUnreadable(
                "layers_to_transform and layers_pattern need target_modules to be a list.",
                field="config.target_modules",
            )
        if wanted.lower() == "all-linear":
            return [path for path in paths if place_of(layers[path]) == "linear" and not is_head(path)]
        return [path for path in paths if patterns.fullmatch(wanted, path)]
    found = [path for path in paths if _named(wanted, path, patterns)]
    if indices is None or indices == []:
        return found
    chosen: Collection[Any] = indices if isinstance(indices, list) else [indices]
    if not all(isinstance(index, int) and not isinstance(index, bool) for index in chosen):
        raise AdapterUnreadable(
            f"layers_to_transform must be layer numbers, not {quoted(indices)}.", field="config.layers_to_transform"
        )
    chosen = frozenset(chosen)
    _names(config, "layers_pattern")
    prefixes = config.get("layers_pattern") or []
    prefixes = [prefixes] if isinstance(prefixes, str) else prefixes
    return [path for path in found if path in wanted or _index(path, prefixes, patterns) in chosen]


def _named(wanted: str | frozenset[str], path: str, patterns: Patterns) -> bool:
    if isinstance(wanted, str):
        return patterns.fullmatch(wanted, path) is not None
    # Each end of the path is looked up: a list may hold a million names.
    return not wanted.isdisjoint(ends(path))


def _index(path: str, prefixes: Sequence[str], patterns: Patterns) -> int | None:
    """The number behind the first prefix, in the file's order, that the path has one for: its first, since those behind
    it count experts. Without prefixes, whatever stands in front of the number."""
    if not prefixes:
        match: Any = BLOCK.match(path)
        return int(match[1]) if match else None
    for prefix in prefixes:
        if prefix.isidentifier():
            match = re.search(rf"(?:^|\.){prefix}\.(\d+)\.", path)
        else:
            match = patterns.match(rf"(?:^|.*?\.){prefix}\.(\d+)\.", path)
        # An expression with `|` or a comment in it may leave the number out.
        number = match and match[match.re.groups]
        if number and number.isdecimal():
            return int(number)
    return None


def _names(config: Mapping[str, Any], field: str) -> str | frozenset[str] | None:
    value = config.get(field)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list | tuple | set) and all(isinstance(name, str) for name in value):
        return frozenset(value)
    raise AdapterUnreadable(
        f"{field} must be a list of names or a regular expression, not {quoted(value)}.", field=f"config.{field}"
    )


def _flag(config: Mapping[str, Any], field: str) -> bool:
    value = config.get(field, False)
    if not isinstance(value, bool):
        raise AdapterUnreadable(f"{field} must be true or false, not {quoted(value)}.", field=f"config.{field}")
    return value


def _table(config: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    value = config.get(field) or {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise AdapterUnreadable(f"{field} must map names to numbers, not {quoted(value)}.", field=f"config.{field}")
    return value


def _positive(value: object, field: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
        raise AdapterUnreadable(
            f"{field} must be a rank from 1 to {MAX_RANK} in the adapter configuration, not {quoted(value)}.",
            field=f"config.{field}",
        )
    return value


def _number(value: object, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e30:
        raise AdapterUnreadable(
            f"{field} must be a number in the adapter configuration, not {quoted(value)}.", field=f"config.{field}"
        )
    return float(value)


def write(
    bundle: AdapterBundle, scoring: Scoring = NO_SCORING, parameters: Mapping[str, Parameter] = NO_PARAMETERS
) -> tuple[bytes, dict[str, Any]]:
    """(adapter_model.safetensors, adapter_config.json) that PEFT loads on a base with this `scoring` and these
    `parameters`, and that read back to the same digest.

    Raises `AdapterUnsupported` for adapters on stacked experts, and for what has no low-rank part."""
    modules = bundle.spec.modules
    if bundle.spec.kind in DENSE_KINDS:
        raise AdapterUnsupported({"format": f"PEFT has no file for kind {bundle.spec.kind}: leave the format out."})
    stacked = next((path for path, module in modules.items() if module.place == "experts"), None)
    if stacked is not None:
        reason = f"An adapter on stacked experts ({stacked}) is not written in PEFT's form: use mlx."
        raise AdapterUnsupported({"format": reason})
    rank = Counter(module.rank for module in modules.values()).most_common(1)[0][0]
    # A float32 scale times a rank is exact in float64, so dividing again gives the scale back.
    alphas = {path: module.scale * module.rank for path, module in modules.items()}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        **task_type_of(bundle.spec, scoring, parameters),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": bundle.spec.kind == "dora",
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": sorted(saved_modules(bundle.spec, parameters)) or None,
        "target_modules": [exported(path) for path in modules],
        "rank_pattern": {_exactly(path): m.rank for path, m in modules.items() if m.rank != rank},
        "alpha_pattern": {_exactly(path): _plain(value) for path, value in alphas.items() if value != alpha},
    }
    tensors: dict[str, AdapterTensor] = {}
    for name, tensor in bundle.tensors.items():
        path, _, part = name.rpartition(".")
        if name in bundle.spec.head:
            tensors[f"base_model.model.{name}"] = tensor
            continue
        if name in bundle.spec.dense:
            below = ".base_layer" if path in modules else ""
            tensors[f"base_model.model.{exported(path)}{below}.{part}"] = tensor
            continue
        tensors[f"base_model.model.{exported(path)}.{_spell(part, modules[path].place)}"] = tensor
    return write_safetensors(tensors, {"format": "pt", "adapter_config": json.dumps(config)}), config


def _exactly(path: str) -> str:
    return "^" + re.escape(exported(path))


def _plain(value: float) -> int | float:
    return int(value) if value.is_integer() else value
