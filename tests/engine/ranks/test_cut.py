"""What cannot be cut over ranks is refused with its name, before any rank waits for another."""

from __future__ import annotations

import importlib
from typing import Any

import mlx.nn as nn
import numpy as np
import pytest

from adapters.prepare import HostFactors
from adapters.resident.cuts import Cut
from adapters.spec import ExpertsShape
from rollout_server.engine.ranks.cut import refuse_uncut
from rollout_server.errors import EngineUnavailable


def family(name: str) -> type[nn.Module]:
    module: Any = importlib.import_module(f"mlx_lm.models.{name}")
    cls: type[nn.Module] = module.Model
    return cls


@pytest.mark.parametrize("name", ["gemma3", "phi3", "mamba2"])
def test_a_family_without_shard_is_refused_by_name(name: str) -> None:
    with pytest.raises(EngineUnavailable, match=rf"cannot serve a {name} model: .* has no shard\(\)"):
        refuse_uncut({"model_type": name}, family(name), 2)


@pytest.mark.parametrize(
    ("said", "size", "what"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, 4, "num_attention_heads is 6, which 4 ranks"),
        ({"num_attention_heads": 8, "num_key_value_heads": 2}, 4, "num_key_value_heads is 2, which 4 ranks"),
        ({"text_config": {"num_attention_heads": 9}}, 2, "num_attention_heads is 9, which 2 ranks"),
    ],
)
def test_heads_that_do_not_divide_are_refused_by_name(said: dict[str, Any], size: int, what: str) -> None:
    with pytest.raises(EngineUnavailable, match=what):
        refuse_uncut({"model_type": "qwen3", **said}, family("qwen3"), size)


def test_heads_that_divide_are_served() -> None:
    refuse_uncut({"model_type": "qwen3", "num_attention_heads": 8, "num_key_value_heads": 4}, family("qwen3"), 4)


class Group:
    """A rank of a group that is not there."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def test_parts_of_an_adapter_add_up_to_its_product() -> None:
    """Of a layer whose outputs are cut, ranks have columns of y; of one whose inputs are cut, parts of a sum."""
    random = np.random.default_rng(0)
    a, b, x, gain = (random.standard_normal(shape) for shape in ((4, 12), (4, 8), (5, 12), (8,)))
    whole = gain * (x @ a.T @ b)
    outputs, inputs = [], np.zeros_like(whole)
    for rank in range(2):
        cut = Cut("outputs", Group(rank, 2))  # type: ignore[arg-type]
        own = cut.factors(HostFactors(a, b))
        outputs.append(cut.gain(gain) * (x @ own.a.T @ own.b))
        cut = Cut("inputs", Group(rank, 2))  # type: ignore[arg-type]
        own = cut.factors(HostFactors(a, b))
        inputs += x[:, cut.own(12)] @ own.a.T @ own.b
        assert cut.gain(gain) is gain
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), whole)
    np.testing.assert_allclose(gain * inputs, whole)


def test_the_shape_of_a_part_keeps_what_kind_of_layer_it_is() -> None:
    outputs, inputs = (Cut(side, Group(1, 4)) for side in ("outputs", "inputs"))  # type: ignore[arg-type]
    assert outputs.shape((8, 12)) == (2, 12) and inputs.shape((8, 12)) == (8, 3)
    stacked = inputs.shape(ExpertsShape(8, 12, 3))
    assert isinstance(stacked, ExpertsShape) and (tuple(stacked), stacked.experts) == ((8, 3), 3)
