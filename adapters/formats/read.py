"""An adapter file of any format, to a bundle."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeVar

from adapters.bundle import NO_PARAMETERS, AdapterBundle, make_bundle
from adapters.errors import AdapterDoesNotFit, AdapterUnreadable, AdapterUnsupported, shown
from adapters.formats import mlx_lm, peft, whole_tensors
from adapters.formats.fit import Proposal, faults
from adapters.spec import DENSE_KINDS, NO_SCORING, AdapterSpec, Parameter, Scoring, experts_of, quoted
from adapters.tensors import AdapterTensor, FileTensor, read_safetensors

FORMATS = {"peft": peft, "mlx": mlx_lm}
MARKS = {"peft": ("peft_type", "lora_alpha"), "mlx": ("fine_tune_type", "lora_parameters")}
"""Fields that only one of the formats has."""
WRAPPERS = r"_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"
"""What torch writes into the names of a model that is compiled, data-parallel, sharded or checkpointed. It says nothing
about the layers, so it is left out of what is read."""
IN_NAMES = re.compile(rf"(?:^|(?<=\.))(?:{WRAPPERS}|module)\.")
"""Those in names of tensors. No model of mlx-lm has a part that is called `module`."""
IN_PATTERNS = re.compile(rf"(?:{WRAPPERS})\\?\.")
"""Those in patterns, with their dots escaped or not."""
FIELDS = ("target_modules", "exclude_modules", "target_parameters", "modules_to_save", "rank_pattern", "alpha_pattern")
"""The fields of PEFT's configuration that name layers."""


T = TypeVar("T")


def read_bundle(
    weights: bytes | memoryview,
    config: Mapping[str, Any] | None,
    *,
    format: str = "auto",
    layers: Mapping[str, tuple[int, int]],
    parameters: Mapping[str, Parameter] = NO_PARAMETERS,
    scoring: Scoring = NO_SCORING,
) -> AdapterBundle:
    """Parse, convert to PEFT layout, check against the base's `layers` (path → (out, in)), `parameters` and `scoring`,
    and hash.

    `config` is adapter_config.json; without it the file's own metadata under `adapter_config` is taken. `format` is
    `auto`, `peft` or `mlx`. Raises `AdapterUnreadable`, `AdapterUnsupported`, or `AdapterDoesNotFit` with all faults.
    """
    return make_bundle(
        *read_tensors(weights, config, format=format, layers=layers, parameters=parameters, scoring=scoring)
    )


def read_tensors(
    weights: bytes | memoryview,
    config: Mapping[str, Any] | None,
    *,
    format: str = "auto",
    layers: Mapping[str, tuple[int, int]],
    parameters: Mapping[str, Parameter] = NO_PARAMETERS,
    scoring: Scoring = NO_SCORING,
) -> tuple[AdapterSpec, dict[str, AdapterTensor]]:
    """What `read_bundle` makes a bundle of, neither hashed nor measured yet; with the same errors."""
    tensors, metadata = read_safetensors(weights)
    if config is None:
        config = _config_of(metadata)
    elif "adapter_config" in metadata and _config_of(metadata) != config:
        raise AdapterUnreadable(
            "The configuration that was sent differs from the one in the weights file's metadata under "
            "`adapter_config`: send one of the two, or the same.",
            field="config",
        )
    if not tensors:
        raise AdapterUnreadable("The weights file holds no tensors.", field="weights")
    reader, proposal = _propose(tensors, config, format, layers, parameters, scoring)
    found = faults(proposal, layers, parameters)
    if found:
        misfit = any(fault.misfit for fault in found)
        raise AdapterDoesNotFit(found, _another_base(config) if misfit else "")
    held = {
        f"{module}.{part}": tensor.read().transposed()
        if proposal.transposed and not experts_of(layers[module])
        else tensor.read()
        for (module, part), tensor in proposal.tensors.items()
    }
    held |= {path: tensor.read() for path, tensor in (*proposal.dense.items(), *proposal.head.tensors.items())}
    completed: tuple[AdapterSpec, dict[str, AdapterTensor]] = reader.complete(proposal.spec, held)
    return completed


def _another_base(config: Mapping[str, Any]) -> str:
    """What to do about tensors for layers that this base does not have, or has in another shape."""
    named = config.get("base_model_name_or_path")
    where = f" ({shown(named)}, by its configuration)" if isinstance(named, str) and named else ""
    return f"If it was trained on another base{where}, serve that one with --model."


def _propose(
    tensors: Mapping[str, FileTensor],
    config: Mapping[str, Any],
    format: str,
    layers: Mapping[str, tuple[int, int]],
    parameters: Mapping[str, Parameter],
    scoring: Scoring,
) -> tuple[Any, Proposal]:
    """(The reader of the file's format, what it says)."""
    _known(format)
    tensors, config = _unwrapped(tensors), _unwrapped_config(config)
    if config.get("kind") in DENSE_KINDS or config.get("fine_tune_type") == "full":
        if format != "auto" and (format == "peft" or "fine_tune_type" not in config):
            raise AdapterUnreadable(
                f"The format was given as {format}, but these are whole tensors: leave it out.", field="format"
            )
        return whole_tensors, whole_tensors.read(tensors, config, parameters, scoring)
    if config.get("kind", "lora") not in ("lora", None):
        reason = f"kind {quoted(config['kind'])} is not known: delta and full are, or send a LoRA adapter without it."
        raise AdapterUnsupported({"kind": reason})
    found = _format(format, config, tensors)
    if found == "peft":
        return peft, peft.read(tensors, config, layers, parameters, scoring)
    return mlx_lm, mlx_lm.read(tensors, config, layers)


def _unwrapped(tensors: Mapping[str, T]) -> dict[str, T]:
    """The same tensors under the layers' own names; two that would then have one name keep theirs."""
    bare = {name: IN_NAMES.sub("", name) for name in tensors}
    count = Counter(bare.values())
    return {bare[name] if count[bare[name]] == 1 else name: tensor for name, tensor in tensors.items()}


def _unwrapped_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
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


def _config_of(metadata: Mapping[str, str]) -> Mapping[str, Any]:
    if "adapter_config" not in metadata:
        raise AdapterUnreadable(
            "There is no adapter configuration: send adapter_config.json as `config`, or as JSON in the weights file's "
            "metadata under `adapter_config`."
        )
    try:
        config = json.loads(metadata["adapter_config"], object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise AdapterUnreadable(
            f"`adapter_config` in the weights file's metadata is not JSON: {shown(error)}."
        ) from error
    if not isinstance(config, dict):
        raise AdapterUnreadable("`adapter_config` in the weights file's metadata must be a JSON object.")
    return config


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuses a field that is there twice: nobody can say which value is meant."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the field {quoted(twice)} is there twice")
    return fields


def _known(format: str) -> None:
    if format not in ("auto", *FORMATS):
        raise AdapterUnreadable(f"There is no format {quoted(format)}: auto, peft and mlx are known.", field="format")


def _format(asked: str, config: Mapping[str, Any], tensors: Mapping[str, object]) -> str:
    """`peft` or `mlx`: what the configuration looks like, else what the tensors are called."""
    looks = [name for name, fields in MARKS.items() if any(field in config for field in fields)]
    if len(looks) > 1:
        raise AdapterUnreadable("The adapter configuration mixes fields of PEFT and of mlx-lm: send one of the two.")
    if asked != "auto":
        if looks and looks != [asked]:
            raise AdapterUnreadable(
                f"The format was given as {asked}, but the configuration is one of {looks[0]}.", field="format"
            )
        return asked
    if looks:
        return looks[0]
    if any(name.endswith((".lora_a", ".lora_b")) for name in tensors):
        return "mlx"
    if any(".lora_A" in name or ".lora_B" in name for name in tensors):
        return "peft"
    raise AdapterUnreadable(
        "Neither the configuration nor the tensor names are those of a PEFT or mlx-lm adapter; PEFT writes "
        "peft_type, r, lora_alpha and target_modules, mlx-lm writes fine_tune_type, num_layers and lora_parameters."
    )
