"""Files of whole tensors under the base's own parameter names: what is added to them (`{"kind": "delta"}`), or what
takes their place (`{"kind": "full"}`, and mlx-lm's `fine_tune_type: full`)."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from adapters.errors import AdapterUnreadable, AdapterUnsupported, shown
from adapters.faults import Fault
from adapters.formats.fit import Proposal, twice
from adapters.formats.heads import NO_HEAD, head_in, task_type_of
from adapters.spec import (
    DENSE_KINDS,
    NO_SCORING,
    TIED_HEAD,
    AdapterSpec,
    Kind,
    Parameter,
    Scoring,
    fields_shown,
    place_of,
    quoted,
)
from adapters.tensors import AdapterTensor, FileTensor, write_safetensors

if TYPE_CHECKING:
    from adapters.bundle import AdapterBundle

PREFIX = "base_model.model."
"""What PEFT puts in front of the base's names."""
WITHOUT_EFFECT = frozenset({"base_model_name_or_path", "revision", "task_type"})
BLOCK = re.compile(r"(.*?)\.?\b(\d+)\.(.+)")


def read(
    tensors: Mapping[str, FileTensor],
    config: Mapping[str, Any],
    parameters: Mapping[str, Parameter],
    scoring: Scoring = NO_SCORING,
) -> Proposal:
    """Raises `AdapterUnsupported` for fields that would mean something else, `AdapterUnreadable` for wrong values.

    `lora_parameters` beside `fine_tune_type: full` is no such field: releases of mlx-lm before it wrote null there
    wrote the parameters that it had not used, and no release reads them. A file that has both `kind` and
    `fine_tune_type`, as `write_mlx` makes it, holds what it holds, whatever `num_layers` says."""
    by_mlx = "fine_tune_type" in config
    _refuse_twofold(config)
    if not by_mlx:
        _refuse(config)
    dense: dict[str, FileTensor] = {}
    strangers: list[Fault] = []
    kind: Kind = "delta" if config.get("kind") == "delta" else "full"
    head = head_in(tensors, config, scoring) if kind == "full" else NO_HEAD
    for name, tensor in sorted(tensors.items()):
        if name in head.names:
            continue
        path = name.removeprefix(PREFIX)
        if path in dense:
            strangers.append(twice(name, dense[path]))
        dense[path] = tensor
    count = _count(config.get("num_layers")) if by_mlx and "kind" not in config else None
    return Proposal(
        spec=AdapterSpec(kind, {}, tuple(dense), tuple(head.tensors), head.task),
        targets=lambda: "",
        tensors={},
        strangers=tuple(strangers),
        transposed=False,
        spell=lambda part, _: part,
        dense=dense,
        promised=_promised(count, parameters) if count is not None else (),
        promises=f"num_layers = {quoted(config.get('num_layers'))} says that it was trained",
        head=head,
    )


def complete(spec: AdapterSpec, tensors: dict[str, AdapterTensor]) -> tuple[AdapterSpec, dict[str, AdapterTensor]]:
    """The file says everything."""
    return spec, tensors


def _refuse_twofold(config: Mapping[str, Any]) -> None:
    """Fields that say something else than that these are whole tensors."""
    wrong = {
        field: f"{field} = {quoted(config[field])} contradicts whole tensors: leave it out, or send a low-rank adapter."
        for field in ("peft_type", "r", "lora_alpha", "target_modules")
        if config.get(field) not in (None, [], "")
    }
    if config.get("fine_tune_type", "full") != "full":
        said, kind = quoted(config["fine_tune_type"]), quoted(config["kind"])
        wrong["fine_tune_type"] = f"fine_tune_type = {said} contradicts kind {kind}: leave one of them out."
    elif "fine_tune_type" in config and config.get("kind", "full") != "full":
        wrong["kind"] = f"kind {quoted(config['kind'])} contradicts fine_tune_type = 'full': leave one of them out."
    if wrong:
        raise AdapterUnsupported(wrong)


def _refuse(config: Mapping[str, Any]) -> None:
    wrong = {
        field: value
        for field, value in config.items()
        if field != "kind" and field not in WITHOUT_EFFECT and value not in (None, False, "", [], {})
    }
    if wrong:
        means = "means nothing" if len(wrong) == 1 else "mean nothing"
        out = "leave it out" if len(wrong) == 1 else "leave them out"
        reason = f"{fields_shown(wrong)} {means} beside kind {quoted(config['kind'])}: {out}."
        raise AdapterUnsupported({shown(field): reason for field in wrong})


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise AdapterUnreadable(
            f"num_layers must be a whole number in the adapter configuration, not {quoted(value)}: it says how many "
            "of the last blocks were trained, -1 for all.",
            field="config.num_layers",
        )
    return value


def _promised(count: int, parameters: Mapping[str, Parameter]) -> tuple[str, ...]:
    """mlx-lm's rule: all that is not quantised in the last `count` blocks (0 and below: all) was trained and saved."""
    return tuple(p for p in _in_last_blocks(count, parameters) if not parameters[p].quantised)


def _in_last_blocks(count: int, paths: Iterable[str]) -> list[str]:
    blocks = {path: match for path in paths if (match := BLOCK.fullmatch(path))}
    holder = Counter(match[1] for match in blocks.values()).most_common(1)
    inside = {path: int(match[2]) for path, match in blocks.items() if match[1] == holder[0][0]}
    number = max(inside.values(), default=-1) + 1
    first = number - count if 0 < count < number else 0
    return [path for path, index in inside.items() if index >= first]


def write_mlx(bundle: AdapterBundle, parameters: Mapping[str, Parameter], layers: Mapping[str, Any]) -> bytes:
    """adapters.safetensors that mlx-lm puts in place of its own parameters, with the configuration in the metadata;
    reads back to the same digest. `parameters` and `layers` are the base's, as for `fit`.

    Raises `AdapterUnsupported` for what mlx-lm has no such parameter for."""
    if bundle.spec.kind != "full":
        raise AdapterUnsupported(
            {
                "format": "mlx-lm has no tensors that are added to the base's: leave the format out for the form of "
                f"kind {bundle.spec.kind}."
            }
        )
    if bundle.spec.head:
        raise AdapterUnsupported({"format": "mlx-lm has no heads that score labels: leave the format out."})
    tied = any(place_of(shape) == "tied_head" for shape in layers.values())
    foreign = [
        path for path in bundle.spec.dense if parameters[path].quantised or (tied and path == f"{TIED_HEAD}.weight")
    ]
    if foreign:
        shown_paths = ", ".join(foreign[:4]) + (f" and {len(foreign) - 4} more" if len(foreign) > 4 else "")
        raise AdapterUnsupported(
            {
                "format": f"mlx-lm's model of this base has no plain parameter for {shown_paths}, since the base is "
                "quantised or its head shares the embedding's weight: leave the format out."
            }
        )
    # Both libraries need only know that these are whole tensors; how many layers were trained is not known.
    config = {"kind": "full", "fine_tune_type": "full", "num_layers": -1, "lora_parameters": None}
    return write_safetensors(bundle.tensors, {"format": "mlx", "adapter_config": json.dumps(config)})


def write(bundle: AdapterBundle) -> tuple[bytes, dict[str, Any]]:
    """(safetensors file, its configuration) that read back to the same digest.

    Raises `AdapterUnsupported` for a bundle with low-rank parts."""
    if bundle.spec.kind not in DENSE_KINDS:
        raise AdapterUnsupported({"format": "A low-rank adapter is exported as peft or mlx."})
    config = {"kind": bundle.spec.kind, **task_type_of(bundle.spec)}
    return write_safetensors(bundle.tensors, {"format": "mlx", "adapter_config": json.dumps(config)}), config
