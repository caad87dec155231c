"""Which pattern is a layer's: PEFT's rule, at the price of a look-up where the patterns are names."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from adapters.formats import peft
from adapters.formats.bounded_regex import Patterns
from adapters.formats.bounded_regex import PatternTable as ServerTable
from adapters.formats.read import read_bundle
from trainer_client.adapter.patterns import PatternTable as ClientTable

LAYERS_OF_A_LARGE_MODEL = 80
PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
NAMES = [f"model.layers.{layer}.{part}" for layer in range(LAYERS_OF_A_LARGE_MODEL) for part in PARTS]
RANKS = {name: 2 + (number + len(name)) % 5 for number, name in enumerate(NAMES)}
LAYERS = dict.fromkeys(NAMES, (8, 8))


def by_peft(table: dict[str, int], name: str, default: int) -> int:
    """`get_pattern_key` of PEFT and the line behind its call, as they stand there."""

    def get_pattern_key(keys: Any, key_to_match: str) -> str:
        for key in keys:
            if re.match(rf"(.*\.)?({key})$", key_to_match):
                return key
        return key_to_match

    return table.get(get_pattern_key(table.keys(), name), default)


def test_the_first_pattern_that_matches_is_the_one_that_peft_takes() -> None:
    random = np.random.default_rng(0)
    names = ["a", "a.b", "aXb", "a_b.c", "layers.1.mlp", "layersX1.mlp", "m.layers.1.mlp", "b.c", "a.b.c", ".mlp", "a."]
    names += ["1.mlp", "mlp", "..a-b", "model.layers.11.mlp.up", "model.layers.1.mlp.up"]
    patterns = [
        "a",
        "b",
        "^a",
        "a.b",
        r"a\.b",
        r"^a\.b$",
        "a$",
        ".",
        "..",
        ".*",
        "[ab]",
        "(a|b).c",
        "a|c",
        r"\w+",
        "c$",
    ]
    patterns += [
        "layers.1.mlp",
        r"layers.\d+.mlp",
        "1.mlp",
        "^1.mlp",
        r"layers\.1\.mlp",
        "",
        "^$",
        "a-b",
        r"a\-b",
        ".mlp",
    ]
    patterns += ["layers...mlp", "^layers.1.mlp", "1.mlp.up", r"^model\.layers\.1\.mlp\.up", ".*1.mlp.up", ".*up"]
    for _ in range(3000):
        chosen = random.choice(len(patterns), size=random.integers(1, 9), replace=False)
        table = {patterns[index]: place for place, index in enumerate(chosen)}
        server, client = ServerTable(table, Patterns()), ClientTable(table)
        for name in names:
            expected = by_peft(table, name, -1)
            assert (server.first(name, -1), client.first(name, -1)) == (expected, expected), (table, name)


@pytest.mark.long
def test_more_shapes_of_names_than_are_looked_up_are_matched_one_by_one() -> None:
    names = ["x" * left + "." + "y" * right for left in range(1, 30) for right in range(1, 30)]
    table = {name: place for place, name in enumerate(names)}
    server, client = ServerTable(table, Patterns()), ClientTable(table)
    for name in names[::17]:
        assert server.first(name, -1) == client.first(name, -1) == by_peft(table, name, -1)


def adapter(ranks: dict[str, int]) -> tuple[bytes, dict[str, Any]]:
    """As EVA leaves it: a rank and an alpha for every layer, by its whole name."""
    shapes = {name: {"A": (rank, 8), "B": (8, rank)} for name, rank in RANKS.items()}
    tensors = {
        f"base_model.model.{name}.lora_{half}.weight": np.zeros(shape, np.float32)
        for name, halves in shapes.items()
        for half, shape in halves.items()
    }
    config = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "init_lora_weights": "eva",
        "target_modules": sorted({part.rpartition(".")[2] for part in PARTS}),
        "rank_pattern": ranks, "alpha_pattern": {name: 2 * rank for name, rank in ranks.items()},
    }  # fmt: skip
    return save(tensors), config


@pytest.mark.parametrize(
    "spelt",
    [str, lambda name: "^" + re.escape(name), lambda name: f"^{re.escape(name)}$", lambda name: name[len("model.") :]],
    ids=["whole", "exported", "anchored", "end"],
)
def test_a_rank_for_every_layer_runs_no_expression(
    spelt: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, config = adapter({spelt(name): rank for name, rank in RANKS.items()})
    # Instead of a time: no expression is compiled, so none can take long.
    monkeypatch.setattr("adapters.formats.bounded_regex.SECONDS_TOGETHER", -1.0)
    bundle = read_bundle(weights, config, layers=LAYERS)
    assert {path: module.rank for path, module in bundle.spec.modules.items()} == RANKS
    assert {module.scale for module in bundle.spec.modules.values()} == {2.0}
    written, told = peft.write(bundle)
    assert read_bundle(written, json.loads(json.dumps(told)), layers=LAYERS).digest == bundle.digest


def test_what_others_compute_meanwhile_is_not_the_files_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the thread's own time is asked for: a clock on the wall would run on under load. The module's alone is
    replaced, because servers of other tests live in this process and go by the real one."""
    monkeypatch.setattr("adapters.formats.bounded_regex.time", SimpleNamespace(thread_time=time.thread_time))
    weights, config = adapter({f".*{name}": rank for name, rank in list(RANKS.items())[:20]})
    config["rank_pattern"] = RANKS
    assert read_bundle(weights, config, layers=LAYERS).parts == len(NAMES)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"layers_to_transform": [1]},
            {"m.h.1.x.5.q"},
        ),  # The first number, as PEFT has it: those behind it are experts'.
        ({"layers_to_transform": [5]}, {"m.h.5.x.1.q"}),
        ({"layers_to_transform": [1], "layers_pattern": ["x", "h"]}, {"m.h.5.x.1.q"}),  # In the file's order.
        ({"layers_to_transform": [1], "layers_pattern": ["h", "x"]}, {"m.h.1.x.5.q"}),
        ({"layers_to_transform": [1], "layers_pattern": "[hk]"}, {"m.h.1.x.5.q"}),
    ],
)
def test_layers_are_counted_as_peft_counts_them(fields: dict[str, Any], expected: set[str]) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], **fields}
    layers = {"m.h.1.x.5.q": (2, 2), "m.h.5.x.1.q": (2, 2)}
    assert set(peft.read({}, config, layers, {}).spec.modules) == expected
