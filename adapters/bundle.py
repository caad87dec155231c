"""AdapterBundle: one immutable state of an adapter, and its name by content.

The digest, which `trainer_client` computes without this package, is the SHA-256 of these bytes in this order:

1. UTF-8 JSON, keys sorted, separators `,` and `:`, non-ASCII as it is, no newline after it:
   `{"kind":"lora","modules":{"model.layers.0.mlp.down_proj":{"rank":8,"scale":2.0}}}`.
   A module's name is its parameter path without `.weight`. `scale` is alpha/r or alpha/√r, divided in float64 and
   rounded to float32; it is written with the fewest digits that give this float32 back, in Python's notation for
   that decimal: `json.dumps(float(str(numpy.float32(scale))))`, so 2 is `2.0` and 16/√8 is `5.656854`.
2. For each tensor, sorted by NAME (module + `.lora_A`, `.lora_B` or, for kind `dora`, `.lora_magnitude_vector`;
   code point order): the UTF-8 line `NAME DTYPE SHAPE\\n`, DTYPE as safetensors calls it (`F32`, `F16`, `BF16`),
   SHAPE as JSON without spaces (`[8,64]`), then its little-endian bytes in row-major order. A is [rank, in],
   B [out, rank] and the magnitude [out], whatever the file's layout; the dtype is the file's. An embedding's A is
   [rank, vocabulary]. A head that shares the embedding's weight is a module of its own, `lm_head`. A stack of
   experts is one module, with A [experts, rank, in] and B [experts, out, rank]. A dense tensor's NAME is the path of
   the base's parameter, `model.norm.weight`, and its shape that of the parameter; kinds `delta` and `full` have no
   modules.

The text form is `sha256:` and 64 hex digits.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from adapters import dense, mlx_lm, peft
from adapters.errors import AdapterDoesNotFit, AdapterUnreadable, AdapterUnsupported, shown
from adapters.fit import Proposal, faults
from adapters.math import DeltaMeasure, measure, measure_dense
from adapters.spec import HALVES, AdapterSpec, Mode, Parameter, experts_of, quoted
from adapters.tensors import AdapterTensor, FileTensor, read_safetensors
from adapters.wrappers import unwrapped, unwrapped_config

FORMATS = {"peft": peft, "mlx": mlx_lm}
MARKS = {"peft": ("peft_type", "lora_alpha"), "mlx": ("fine_tune_type", "lora_parameters")}
"""Fields that only one of the formats has."""
NO_PARAMETERS: Mapping[str, Parameter] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class AdapterBundle:
    """`tensors` are keyed NAME.lora_A [rank, in], NAME.lora_B [out, rank] and, for DoRA, NAME.lora_magnitude_vector
    [out], and dense ones by parameter path; in the file's dtype, unscaled."""

    spec: AdapterSpec
    tensors: Mapping[str, AdapterTensor]
    digest: str
    measures: Mapping[str, DeltaMeasure]
    """Measures of each module, and of each dense tensor that is added to the base's."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def rank(self) -> int:
        """The largest of all modules; 0 where there is none."""
        return max((module.rank for module in self.spec.modules.values()), default=0)

    @property
    def parts(self) -> int:
        """How many modules and whole tensors it has."""
        return len(self.spec.modules) + len(self.spec.dense)

    @property
    def delta_norm(self) -> float:
        """Frobenius norm of all deltas, scale · B · A or dense, together; what DoRA's magnitudes and tensors in place
        of the base's change is not in it."""
        return math.sqrt(sum(measure.norm**2 for measure in self.measures.values()))

    @property
    def zero_modules(self) -> tuple[str, ...]:
        """Modules whose delta is exactly zero, as all are before the first step of training."""
        return tuple(path for path, measure in self.measures.items() if measure.zero)


def make_bundle(spec: AdapterSpec, tensors: Mapping[str, AdapterTensor]) -> AdapterBundle:
    """A bundle of tensors that fit `spec`: hashed and measured."""
    measures: dict[str, DeltaMeasure] = {}
    for path, module in spec.modules.items():
        a, b = (tensors[f"{path}.{half}"].float32().astype(np.float64) for half in HALVES)
        measures[path] = measure(a, b, module.scale)
    for path in spec.dense if spec.kind == "delta" else ():
        measures[path] = measure_dense(tensors[path].float32())
    held = MappingProxyType(dict(sorted(tensors.items())))
    return AdapterBundle(spec, held, content_digest(spec, held), MappingProxyType(measures))


def content_digest(spec: AdapterSpec, tensors: Mapping[str, AdapterTensor]) -> str:
    """`sha256:…` over the bytes that the module's docstring defines."""
    modules = {
        path: {"rank": module.rank, "scale": float(str(np.float32(module.scale)))}
        for path, module in spec.modules.items()
    }
    head = {"kind": spec.kind, "modules": modules}
    text = json.dumps(head, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        shape = ",".join(map(str, tensor.array.shape))
        digest.update(f"{name} {tensor.dtype} [{shape}]\n".encode())
        digest.update(tensor.array.data)
    return f"sha256:{digest.hexdigest()}"


def read_bundle(
    weights: bytes | memoryview,
    config: Mapping[str, Any] | None,
    *,
    format: str = "auto",
    layers: Mapping[str, tuple[int, int]],
    parameters: Mapping[str, Parameter] = NO_PARAMETERS,
) -> AdapterBundle:
    """Parse, convert to PEFT layout, check against the base's `layers` (path → (out, in)) and `parameters`, and hash.

    `config` is adapter_config.json; without it the file's own metadata under `adapter_config` is taken. `format` is
    `auto`, `peft` or `mlx`. Raises `AdapterUnreadable`, `AdapterUnsupported`, or `AdapterDoesNotFit` with all faults.
    """
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
    reader, proposal = _propose(tensors, config, format, layers, parameters)
    found = faults(proposal, layers, parameters)
    if found:
        raise AdapterDoesNotFit(found)
    held = {
        f"{module}.{part}": tensor.read().transposed()
        if proposal.transposed and not experts_of(layers[module])
        else tensor.read()
        for (module, part), tensor in proposal.tensors.items()
    }
    held |= {path: tensor.read() for path, tensor in proposal.dense.items()}
    return make_bundle(*reader.complete(proposal.spec, held))


def _propose(
    tensors: Mapping[str, FileTensor],
    config: Mapping[str, Any],
    format: str,
    layers: Mapping[str, tuple[int, int]],
    parameters: Mapping[str, Parameter],
) -> tuple[Any, Proposal]:
    """(The reader of the file's format, what it says)."""
    _known(format)
    tensors, config = unwrapped(tensors), unwrapped_config(config)
    if dense.is_dense(config):
        if format != "auto" and (format == "peft" or "fine_tune_type" not in config):
            raise AdapterUnreadable(
                f"The format was given as {format}, but these are whole tensors: leave it out.", field="format"
            )
        return dense, dense.read(tensors, config, parameters)
    if config.get("kind", "lora") not in ("lora", None):
        reason = f"kind {quoted(config['kind'])} is not known: delta and full are, or send a LoRA adapter without it."
        raise AdapterUnsupported({"kind": reason})
    found = _format(format, config, tensors)
    if found == "peft":
        return peft, peft.read(tensors, config, layers, parameters)
    return mlx_lm, mlx_lm.read(tensors, config, layers)


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


class Content(NamedTuple):
    """What a version computes with; two versions of one content share their memory."""

    digest: str
    mode: Mode
