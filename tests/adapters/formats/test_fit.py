"""One fault for each thing that does not fit, and none for what does: of proposals that are made here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from adapters.faults import Fault
from adapters.formats.fit import NOT_REPLACED, ON_TOWER, Proposal, faults
from adapters.spec import AdapterSpec, ExpertsShape, ModuleSpec, Parameter
from adapters.tensors import STORAGE, FileTensor

LAYERS: dict[str, tuple[int, int]] = {
    "layers.0.q_proj": (6, 4),
    "layers.0.k_proj": (4, 4),
    "layers.0.experts": ExpertsShape(6, 4, 3),
}
PARAMETERS = {"norm.weight": Parameter((4,), "float32"), "layers.0.q_proj.weight": Parameter((6, 4), "float32")}
Q, EXPERTS = "layers.0.q_proj", "layers.0.experts"


def tensor(name: str, *shape: int, dtype: str = "F32", value: float = 0.5) -> FileTensor:
    """Of a dtype that is not served, it has no values that anybody could read."""
    data = b"" if dtype not in STORAGE else np.full(shape, value).astype(STORAGE[dtype]).tobytes()
    return FileTensor(name, dtype, shape, data)


def parts(module: str = Q, rank: int = 2, out: int = 6, width: int = 4) -> dict[tuple[str, str], FileTensor]:
    return {
        (module, "lora_A"): tensor(f"{module}.lora_A", rank, width),
        (module, "lora_B"): tensor(f"{module}.lora_B", out, rank),
    }


def proposed(
    tensors: Mapping[tuple[str, str], FileTensor],
    *modules: str,
    kind: Any = "lora",
    transposed: bool = False,
    **fields: Any,
) -> Proposal:
    spec = AdapterSpec(kind, {module: ModuleSpec(2, 1.0) for module in modules})
    return Proposal(spec, lambda: "['v_proj']", tensors, (), transposed, lambda part, place: f"{part}.weight", **fields)


def found(proposal: Proposal, parameters: Mapping[str, Parameter] = PARAMETERS) -> list[Fault]:
    return faults(proposal, LAYERS, parameters)


def only(proposal: Proposal, parameters: Mapping[str, Parameter] = PARAMETERS) -> Fault:
    (fault,) = found(proposal, parameters)
    return fault


def test_what_fits_has_no_fault() -> None:
    assert not found(proposed(parts(), Q))
    magnitude = {(Q, "lora_magnitude_vector"): tensor("m", 6)}
    assert not found(proposed(parts() | magnitude, Q, kind="dora"))
    turned = {(Q, "lora_A"): tensor("a", 4, 2), (Q, "lora_B"): tensor("b", 2, 6)}
    assert not found(proposed(turned, Q, transposed=True))
    stacked = {(EXPERTS, "lora_A"): tensor("a", 3, 2, 4), (EXPERTS, "lora_B"): tensor("b", 3, 6, 2)}
    for transposed in (False, True):  # stacks are never turned
        assert not found(proposed(stacked, EXPERTS, transposed=transposed))


def test_a_target_without_tensors_and_half_a_layer_are_different_faults() -> None:
    assert "has no tensors for it" in only(proposed({}, Q)).sentence
    half = {key: value for key, value in parts().items() if key[1] == "lora_A"}
    assert only(proposed(half, Q)).sentence == (f"{Q}.lora_B.weight is missing: the file has only {Q}.lora_A.weight.")
    assert only(proposed(parts(), Q, kind="dora")).example == f"{Q}.lora_magnitude_vector.weight"


def test_a_configuration_that_targets_nothing_says_what_there_is() -> None:
    fault = only(proposed({}))
    assert fault.misfit and "['v_proj']" in fault.sentence and "experts, k_proj, q_proj" in fault.sentence


@pytest.mark.parametrize(
    ("module", "misfit", "said"),
    [
        ("layers.9.q_proj", True, "the base has no adaptable layer layers.9.q_proj"),
        ("layers.0.k_proj", False, "the configuration does not target layers.0.k_proj"),
        ("visual.blocks.0.qkv", False, ON_TOWER),
        ("model.vision_tower.blocks.0.qkv", False, ON_TOWER),
        ("layers.0.visually.qkv", True, "the base has no adaptable layer"),
    ],
)
def test_a_tensor_that_nobody_asked_for_says_why(module: str, misfit: bool, said: str) -> None:
    fault = only(proposed(parts() | {(module, "lora_A"): tensor("extra", 2, 4)}, Q))
    assert said in fault.sentence and fault.misfit is misfit


def test_a_magnitude_is_no_part_of_what_is_not_dora() -> None:
    magnitude = {(Q, "lora_magnitude_vector"): tensor("m", 6)}
    assert "does not say that this is DoRA" in only(proposed(parts() | magnitude, Q)).sentence


def test_a_prefix_is_named_once_for_a_tensor_and_its_layer_is_not_missing() -> None:
    both = found(proposed(parts(f"base_model.{Q}"), Q))
    assert [fault.kind for fault in both] == [both[0].kind] * 2
    assert all("has the prefix 'base_model.' in front of layers.0.q_proj" in fault.sentence for fault in both)


@pytest.mark.parametrize(
    ("part", "shape", "said", "misfit"),
    [
        ("lora_A", (4, 2), "it looks transposed", False),
        ("lora_A", (3, 4), "the configuration says rank 2", False),
        ("lora_A", (2, 5), "has shape [2, 5] but must be [2, 4].", True),
        ("lora_B", (6, 3), "the configuration says rank 2", False),
        ("lora_B", (6,), "has shape [6] but must be [6, 2].", True),
    ],
)
def test_a_wrong_shape_says_what_it_may_come_from(part: str, shape: tuple[int, ...], said: str, misfit: bool) -> None:
    fault = only(proposed(parts() | {(Q, part): tensor("t", *shape)}, Q))
    assert said in fault.sentence and fault.misfit is misfit


def test_stacks_have_a_matrix_for_each_expert() -> None:
    stacked = {(EXPERTS, "lora_A"): tensor("a", 2, 2, 4), (EXPERTS, "lora_B"): tensor("b", 3, 6, 2)}
    assert "one matrix for each expert" in only(proposed(stacked, EXPERTS)).sentence


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_are_finite(value: float) -> None:
    fault = only(proposed(parts() | {(Q, "lora_A"): tensor("t", 2, 4, value=value)}, Q))
    assert fault.sentence == "t holds values that are not finite (NaN or infinity)."


def test_a_dtype_that_is_not_served_is_told_besides_a_wrong_shape_and_is_not_read() -> None:
    wide, eight = (tensor(name, 2, 4, dtype=name) for name in ("F64", "F8_E4M3"))
    assert only(proposed(parts() | {(Q, "lora_A"): wide}, Q)).remedy == "Cast them to float32."
    assert only(proposed(parts() | {(Q, "lora_A"): tensor("i", 2, 4, dtype="I8")}, Q)).remedy.startswith("Send the")
    assert "dtype F8_E4M3" in only(proposed(parts() | {(Q, "lora_A"): eight}, Q)).sentence
    kinds = [fault.kind for fault in found(proposed(parts() | {(Q, "lora_A"): tensor("w", 9, 9, dtype="F64")}, Q))]
    assert len(kinds) == 2 and kinds[0].startswith("tensors have dtype F64")


def test_whole_tensors_are_compared_with_the_base_s_parameters() -> None:
    def dense(**tensors: FileTensor) -> Proposal:
        paths = {name.replace("__", "."): each for name, each in tensors.items()}
        return proposed({}, kind="full", dense=paths, promised=("norm.weight",), promises="modules_to_save says so")

    assert not found(dense(norm__weight=tensor("n", 4)))
    assert only(dense()).sentence == "norm.weight is missing: modules_to_save says so."
    wrong = only(dense(norm__weight=tensor("n", 5)))
    assert wrong.misfit and "must be [4]" in wrong.sentence
    fits = {"norm__weight": tensor("n", 4)}
    assert only(dense(**fits, bias=tensor("b", 4))).misfit
    assert "has the prefix 'x.'" in only(dense(**fits, x__norm__weight=tensor("x", 4))).sentence
    turned = proposed({}, kind="full", dense={f"{Q}.weight": tensor("q", 4, 6)})
    assert "it looks transposed" in only(turned).sentence
    assert NOT_REPLACED in only(dense(**fits), {}).sentence


def test_every_fault_is_told_at_once_in_the_same_order() -> None:
    tensors = parts() | {(Q, "lora_A"): tensor("a", 9, 9), ("z", "lora_A"): tensor("z", 2, 4)}
    stranger = Fault("s is unexpected.")
    given = proposed(tensors, Q, "layers.0.k_proj")
    given = Proposal(given.spec, given.targets, tensors, (stranger,), False, given.spell)
    turned = Proposal(given.spec, given.targets, dict(reversed(tensors.items())), (stranger,), False, given.spell)
    assert len(found(given)) == 4 and found(given)[0] is stranger
    assert found(given) == found(turned)
