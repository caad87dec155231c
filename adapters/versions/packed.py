"""One version of an adapter as one safetensors file, as the server keeps it."""

from __future__ import annotations

import json
from dataclasses import asdict

from adapters.bundle import AdapterBundle, make_bundle
from adapters.errors import AdapterUnreadable
from adapters.spec import AdapterSpec, ModuleSpec
from adapters.tensors import read_safetensors, write_safetensors

FORMAT = 1


def pack(bundle: AdapterBundle) -> bytes:
    """One safetensors file: the bundle's own tensors under its own names, and what they mean in the metadata."""
    modules = {path: asdict(module) for path, module in bundle.spec.modules.items()}
    own = bundle.spec
    spec = json.dumps({"kind": own.kind, "modules": modules, "dense": own.dense, "head": own.head, "task": own.task})
    return write_safetensors(bundle.tensors, {"format": str(FORMAT), "spec": spec})


def unpack(body: bytes) -> AdapterBundle:
    """The bundle of `pack`, hashed anew. Raises any of a dozen errors for anything else."""
    files, metadata = read_safetensors(body)
    spec = json.loads(metadata["spec"])
    modules = {path: ModuleSpec(**module) for path, module in spec["modules"].items()}
    if not all(tensor.readable for tensor in files.values()):
        raise AdapterUnreadable("A tensor has a dtype that is not served.")
    tensors = {name: tensor.read() for name, tensor in files.items()}
    # Files of earlier versions of this program have no dense tensors, or no heads.
    dense, head = (tuple(spec.get(name, ())) for name in ("dense", "head"))
    return make_bundle(AdapterSpec(spec["kind"], modules, dense, head, spec.get("task")), tensors)
