"""Arrays of any framework and numbers of numpy wherever a trainer has them; what cannot be sent is refused by name."""

from __future__ import annotations

import json
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load, save_file

from rollout_server.rollout import NAME_RULE
from tests.trainer_client import contract
from trainer_client import Retry, RolloutClient, ServerUnreachable, TrainerClientError, continued, group_advantages
from trainer_client.adapter.tensors import host_tensor
from trainer_client.errors import InvalidField
from trainer_client.verbs import publishing, sampling, scoring
from trainer_client.wire import call
from trainer_client.wire.parsing import parse_reply

LAYER = "base_model.model.q"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
HALVES = {f"{LAYER}.lora_A.weight": np.ones((2, 3)), f"{LAYER}.lora_B.weight": np.full((4, 2), 0.1)}
"""float64, as numpy makes it."""
SERVED = {name: array.astype(np.float32) for name, array in HALVES.items()}


class Tensor:
    """What torch and its like have: a device to leave, a gradient to drop, and no numpy before that."""

    def __init__(self, values: Any, *, here: bool = False) -> None:
        self._values, self._here = np.asarray(values), here
        self.ndim = self._values.ndim

    def detach(self) -> Tensor:
        return self

    def cpu(self) -> Tensor:
        return Tensor(self._values, here=True)

    def item(self) -> Any:
        return self._values.item()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if not self._here:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad.")
        return self._values


def body(call: call.Call[Any]) -> dict[str, Any]:
    return json.loads(bytes(call.body))


def sent_digest(call: call.Call[Any]) -> str:
    return call.parse.keywords["sent_digest"]  # type: ignore[attr-defined,no-any-return]


# ---- tensors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "made",
    [
        lambda a: a,
        lambda a: a.tolist(),
        lambda a: a.astype(np.longdouble),
        lambda a: np.asfortranarray(a),
        lambda a: a.astype(">f8"),
        Tensor,
    ],
)
def test_floats_in_which_no_adapter_is_served_are_cast_and_told_once(made: Callable[[np.ndarray], Any]) -> None:
    given = {name: made(array) for name, array in HALVES.items()}
    with pytest.warns(UserWarning, match="2 of 2 tensors are float") as told:
        call = publishing.push("policy", given, CONFIG)
    assert len(told) == 1
    assert bytes(call.body) == bytes(publishing.push("policy", SERVED, CONFIG).body)
    assert sent_digest(call) == sent_digest(publishing.push("policy", SERVED, CONFIG))


def test_the_warning_points_at_the_line_that_pushes() -> None:
    with (
        RolloutClient("http://127.0.0.1:9", retry=Retry(attempts=1)) as client,
        pytest.warns(UserWarning) as told,
        pytest.raises(ServerUnreachable),
    ):
        client.push("policy", HALVES, CONFIG)
    assert told[0].filename == __file__


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_what_adapters_are_served_in_is_sent_as_it_is_without_a_word(dtype: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = host_tensor("x", np.ones((2, 3), dtype))
        publishing.push("policy", SERVED, CONFIG)
    assert tensor.was is None and tensor.array.nbytes == 6 * np.dtype(dtype).itemsize


def test_a_directory_of_float64_is_pushed_like_the_arrays(tmp_path: Path) -> None:
    save_file(HALVES, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    with pytest.warns(UserWarning, match="float64"):
        call = publishing.push("policy", tmp_path)
    assert bytes(call.body) == bytes(publishing.push("policy", SERVED, CONFIG).body)


def test_integers_are_not_guessed_at_but_lists_of_them_are_numbers() -> None:
    assert host_tensor("x", np.ones((2, 2), np.int8)).dtype == "I8"  # codes of something, perhaps; the server refuses
    assert host_tensor("x", [[1, 2], [3, 4]]).dtype == "F32"


@pytest.mark.parametrize(
    ("tensor", "sentence"),
    [
        (np.array([1e300]), "holds 1e.300, which is outside the range of float32"),
        ([[1.0], [1.0, 2.0]], "a list, cannot be read here"),
        (types.SimpleNamespace(full_tensor=None), "gather it with full_tensor"),
    ],
)
def test_what_cannot_be_read_is_named(tensor: Any, sentence: str) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"'layer\.q'.*{sentence}"):
        host_tensor("layer.q", tensor)


@pytest.mark.parametrize("front", ["module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module."])
def test_what_wraps_a_model_is_left_out_of_the_names(front: str) -> None:
    wrapped = {front + name: array for name, array in SERVED.items()}
    call = publishing.push("policy", wrapped, CONFIG | {"rank_pattern": {f"{front}q": 2}})
    assert load(bytes(call.body)).keys() == SERVED.keys()
    assert sent_digest(call) == sent_digest(publishing.push("policy", SERVED, CONFIG))


# ---- configurations -----------------------------------------------------------------------------------------------


@dataclass
class LoraConfig:
    """As PEFT's: an object with `to_dict`, sets inside."""

    peft_type: str = "LORA"
    r: int = 2
    lora_alpha: Any = field(default_factory=lambda: np.int64(4))
    target_modules: set[str] = field(default_factory=lambda: {"q"})

    def to_dict(self) -> dict[str, Any]:
        return vars(self)


def test_a_config_may_be_the_object_that_a_trainer_holds(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    expected = bytes(publishing.push("policy", SERVED, CONFIG).body)
    arguments = types.SimpleNamespace(**CONFIG)
    for config in (LoraConfig(), {"default": LoraConfig()}, arguments, tmp_path / "adapter_config.json"):
        assert bytes(publishing.push("policy", SERVED, config).body) == expected
    with pytest.raises(TypeError, match="or a LoraConfig, not list"):
        publishing.push("policy", SERVED, [1])


@pytest.mark.parametrize("fields", [{"r": "2"}, {"lora_alpha": "4"}, {"alpha_pattern": {"(": 1}}, {"r": 0}])
def test_a_config_that_the_server_refuses_gets_there_to_be_refused(fields: dict[str, Any]) -> None:
    assert sent_digest(publishing.push("policy", SERVED, CONFIG | fields)) is None


# ---- ids and options ----------------------------------------------------------------------------------------------

IDS = np.array([1, 2, 3])


@pytest.mark.parametrize(
    "ids",
    [IDS, IDS.astype(np.int32), Tensor(IDS), mx.array(IDS), tuple(IDS), list(IDS), range(1, 4), list(map(Tensor, IDS))],
)
def test_ids_of_any_framework_wherever_ids_are_taken(ids: Any) -> None:
    prefix = {"token_ids": ids, "logprobs": np.array([-0.5, np.nan, 0.0])}
    prompts = body(sampling.rollouts([ids, {"token_ids": ids, "prefix": prefix}], stop_token_ids=ids))
    assert [prompt["token_ids"] for prompt in prompts["prompts"]] == [[1, 2, 3]] * 2
    assert prompts["prompts"][1]["prefix"] == {"token_ids": [1, 2, 3], "logprobs": [-0.5, None, 0.0]}
    assert prompts["sampling"] == {"stop_token_ids": [1, 2, 3]}
    sequences = body(scoring.logprobs([ids, {"token_ids": ids, "start": np.int64(1)}]))["sequences"]
    assert sequences == [{"token_ids": [1, 2, 3]}, {"token_ids": [1, 2, 3], "start": 1}]
    assert body(sampling.completions(ids))["prompt"] == [1, 2, 3]
    row = parse_reply(contract.reply(contract.rollouts(contract.row())))[0]
    assert continued(row, ids)["prefix"]["token_ids"][-3:] == [1, 2, 3]


def test_a_rectangle_of_ids_is_a_list_of_prompts() -> None:
    both = mx.array([[1, 2], [3, 4]])
    assert body(sampling.rollouts(both))["prompts"] == [{"token_ids": [1, 2]}, {"token_ids": [3, 4]}]
    assert body(scoring.logprobs(both))["sequences"] == [{"token_ids": [1, 2]}, {"token_ids": [3, 4]}]


def test_numbers_of_numpy_in_every_option_and_as_keys() -> None:
    options: dict[str, Any] = {
        "n": np.int64(2), "max_tokens": np.int32(3), "temperature": np.float32(0.5), "seed": np.uint64(7),
        "ignore_eos": np.bool_(True), "timeout_s": np.float64(5), "stop": {"a"},
        "logit_bias": {np.int64(5): np.float32(1), Tensor(np.array(6)): 2, "7": 3},
    }  # fmt: skip
    call = sampling.rollouts(["a"], **options)
    assert body(call)["sampling"] == {
        "max_tokens": 3, "temperature": 0.5, "seed": 7, "ignore_eos": True, "stop": ["a"],
        "logit_bias": {"5": 1.0, "6": 2, "7": 3},
    }  # fmt: skip
    assert (body(call)["n"], call.timeout_s) == (2, 65.0)
    assert body(sampling.completions("a", logit_bias={np.int64(5): 1})) == {
        "model": "base", "prompt": "a", "logit_bias": {"5": 1}
    }  # fmt: skip
    assert body(publishing.pin("p", np.int64(3), np.bool_(False)))["pinned"] is False  # type: ignore[arg-type]
    assert body(publishing.activate("p", np.int64(3))) == {"version": 3}  # type: ignore[arg-type]
    assert publishing.push("p", SERVED, CONFIG, label=120).query["label"] == "120"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperature": float("nan")}, "^temperature is nan"),
        ({"top_p": np.float32("inf")}, "^top_p is inf"),
        ({"timeout_s": float("nan")}, "^timeout_s is nan"),
        ({"logit_bias": {5: float("nan")}}, r"^logit_bias\.5 is nan"),
        ({"return_when": {"finished": float("inf")}}, r"^return_when\.finished is inf"),
        ({"logit_bias": {5: 1, "5": 2, np.int64(6): 1}}, "^logit_bias has '5' twice"),
        ({"logit_bias": {(1,): 1.0}}, "^logit_bias has the key a tuple"),
        ({"stop": object()}, "^stop holds a object"),
    ],
)
def test_what_no_request_can_say_is_named_by_its_option(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises((TypeError, ValueError), match=sentence) as caught:
        sampling.rollouts(["a"], **options)
    assert len(str(caught.value)) < 200


def test_the_other_verbs_name_it_too() -> None:
    with pytest.raises(ValueError, match=r"^temperature is nan"):
        scoring.logprobs([[1]], temperature=float("nan"))
    with pytest.raises(ValueError, match=r"^top_p is inf"):
        sampling.completions("a", top_p=float("inf"))
    batch = parse_reply(contract.reply(contract.rollouts(contract.row())))
    with pytest.raises(ValueError, match=r"^temperature is nan"):
        scoring.probe(batch, np.zeros(len(batch.token_ids)), temperature=float("nan"))


def test_rewards_and_log_probabilities_of_any_framework() -> None:
    expected = group_advantages(np.array([1.0, 0.0]), np.zeros(2, int))
    for rewards in (Tensor(np.array([1.0, 0.0])), mx.array([1.0, 0.0], dtype=mx.bfloat16), [np.float32(1), 0]):
        assert np.array_equal(group_advantages(rewards, mx.array([0, 0])), expected)
    batch = parse_reply(contract.reply(contract.rollouts(contract.row())))
    values = np.full(len(batch.token_ids), -0.5, np.float32)
    expected_body = bytes(scoring.probe(batch, values).body)
    for given in (Tensor(values), mx.array(values).astype(mx.bfloat16), [Tensor(values)]):
        assert bytes(scoring.probe(batch, given).body) == expected_body  # type: ignore[arg-type]


# ---- names --------------------------------------------------------------------------------------------------------

NO_NAMES: list[Any] = [
    "a/b/c",
    "/2",
    "p/",
    "..",
    ".",
    "",
    "a b",
    "a%2Fb",
    "-a",
    "é",
    "a" * 65,
    "a\n",
    "a@1",
    None,
    7,
    b"a",
]


@pytest.mark.parametrize("name", NO_NAMES)
@pytest.mark.parametrize(
    "verb",
    [
        lambda name: publishing.push(name, SERVED, CONFIG),
        lambda name: publishing.push(name, SERVED, CONFIG, resend=True),
        publishing.policy,
        lambda name: publishing.activate(name, 1),
        lambda name: publishing.pin(name, 1),
        lambda name: publishing.delete(name, 1),
        publishing.delete_policy,
        lambda name: publishing.export(name, 1),
    ],
    ids=["push", "resend", "policy", "activate", "pin", "delete", "delete_policy", "export"],
)
def test_what_cannot_be_a_name_is_refused_before_any_request(verb: Callable[[Any], Any], name: Any) -> None:
    with pytest.raises(InvalidField) as caught:
        verb(name)
    assert str(caught.value).endswith(f" is not a policy name, which is {NAME_RULE}.")
    assert caught.value.param == "name" and len(str(caught.value)) < 220 and str(caught.value).isprintable()
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, TrainerClientError)


def test_a_policy_of_another_model_is_named_by_both() -> None:
    for made in (
        publishing.policy("rm/p"),
        publishing.policy("p", model="rm"),
        publishing.policy("rm/p", model="rm"),
        publishing.delete_policy("rm/p"),
    ):
        assert (made.path, dict(made.query)) == ("/v1/weights/p", {"model": "rm"})
    pushed = publishing.push("rm/p", SERVED, CONFIG)
    assert (pushed.query["name"], pushed.query["model"]) == ("p", "rm")
    assert dict(publishing.export("rm/p", 2, format="mlx").query) == {"model": "rm", "format": "mlx"}
    assert dict(publishing.weights("rm").query) == {"model": "rm"}
    assert not publishing.policy("p", model="base").query and not publishing.weights("base").query
    with pytest.raises(InvalidField, match="'rm/p' is of the model 'rm', not of 'judge'"):
        publishing.policy("rm/p", model="judge")


@pytest.mark.parametrize("version", ["1/2", "latest", "1", 1.5])
def test_a_version_in_a_path_is_a_number(version: Any) -> None:
    for verb in (publishing.delete, publishing.pin, publishing.export):
        with pytest.raises(TypeError, match="whole number"):
            verb("p", version)
    assert publishing.delete("p", np.int64(2)).path == "/v1/weights/p/2"  # type: ignore[arg-type]
