"""Models in memory as `load` makes them: what it finds out about a checkpoint and this device, it finds out once."""

from __future__ import annotations

from collections import OrderedDict
from copy import deepcopy
from dataclasses import replace
from functools import cache
from hashlib import sha256
from pathlib import Path

from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.model.load import load
from rollout_server.engine.model.resident import ResidentModel

MOST_KEPT = 32


def loaded(options: EngineOptions) -> ResidentModel:
    """A model of its own for whoever asks, with modules that nobody has mounted anything on. The trials of caches,
    kernels and adapters at load, nine tenths of its time, are those of the first model of the same files."""
    path, kept = Path(options.model_path), _kept()
    if not path.is_dir():
        return load(options)
    key = replace(options, model_path=_content(path), model_id="")
    if key not in kept:
        kept[key] = load(options)
        if len(kept) > MOST_KEPT:
            kept.popitem(last=False)
    first = kept[key]
    if first.eyes is not None:  # They know the module that they were made for.
        return load(options)
    # Some layers hold a compiled function, as their activation, which cannot be copied and need not be.
    shared = {id(held): held for layer in first.module.modules() for held in vars(layer).values() if callable(held)}
    return replace(first, module=deepcopy(first.module, shared), info=replace(first.info, id=options.model_id))


@cache
def _kept() -> OrderedDict[EngineOptions, ResidentModel]:
    """Of this process, each as bare as it was loaded."""
    return OrderedDict()


def _content(path: Path) -> str:
    digest = sha256()
    for file in sorted(each for each in path.rglob("*") if each.is_file()):
        digest.update(file.relative_to(path).as_posix().encode() + b"\0" + sha256(file.read_bytes()).digest())
    return digest.hexdigest()
