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
   modules. A head's tensors are called as transformers calls them, `score.weight`. What a head is read for, a sequence
   or tokens, is not in the digest: its numbers are the same.

The text form is `sha256:` and 64 hex digits.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from adapters.numerics import DeltaMeasure, Grams, Scratch, measure, measure_dense
from adapters.spec import HALVES, AdapterSpec, Mode, Parameter
from adapters.tensors import AdapterTensor

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
        """How many modules, whole tensors and tensors of a head it has."""
        return len(self.spec.modules) + len(self.spec.dense) + len(self.spec.head)

    @property
    def labels(self) -> int:
        """How many its own head scores; 0 where it has none."""
        weights = [name for name in self.spec.head if name.endswith(".weight")]
        return int(self.tensors[weights[-1]].array.shape[0]) if weights else 0

    @property
    def delta_norm(self) -> float:
        """Frobenius norm of all deltas, scale · B · A or dense, together; what DoRA's magnitudes and tensors in place
        of the base's change is not in it."""
        return math.sqrt(sum(measure.norm**2 for measure in self.measures.values()))

    @property
    def zero_modules(self) -> tuple[str, ...]:
        """Modules whose delta is exactly zero, as all are before the first step of training."""
        return tuple(path for path, measure in self.measures.items() if measure.zero)


class Measured(NamedTuple):
    """A bundle, and what was computed on the way to its measures and is too large to keep."""

    bundle: AdapterBundle
    grams: Mapping[str, Grams]
    """Grams of each module."""


def make_bundle(spec: AdapterSpec, tensors: Mapping[str, AdapterTensor]) -> AdapterBundle:
    """A bundle of tensors that fit `spec`, hashed and measured."""
    return measured(spec, tensors).bundle


def measured(spec: AdapterSpec, tensors: Mapping[str, AdapterTensor]) -> Measured:
    """`make_bundle`'s, which is hashed beside the measuring, since hashing lets other threads run and takes as
    long."""
    held = MappingProxyType(dict(sorted(tensors.items())))
    with ThreadPoolExecutor(1, "digest") as beside:
        digest = beside.submit(content_digest, spec, held)
        measures, grams = _measures(spec, held)
        return Measured(AdapterBundle(spec, held, digest.result(), MappingProxyType(measures)), grams)


def grams_of(bundle: AdapterBundle) -> dict[str, Grams]:
    """Grams of each module, from its factors."""
    return _measures(bundle.spec, bundle.tensors)[1]


def _measures(
    spec: AdapterSpec, tensors: Mapping[str, AdapterTensor]
) -> tuple[dict[str, DeltaMeasure], dict[str, Grams]]:
    measures: dict[str, DeltaMeasure] = {}
    grams: dict[str, Grams] = {}
    scratch, halves = Scratch(), {half: Scratch() for half in HALVES}
    for path, module in spec.modules.items():
        a, b = (tensors[f"{path}.{half}"].float32(halves[half]) for half in HALVES)
        grams[path] = Grams.of(a, b, scratch)
        measures[path] = measure(a, b, module.scale, grams[path])
    for path in spec.dense if spec.kind == "delta" else ():
        measures[path] = measure_dense(tensors[path].float32())
    return measures, grams


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


class Content(NamedTuple):
    """What a version computes with; two versions of one content share their memory."""

    digest: str
    mode: Mode
