from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from adapters.bundle import AdapterBundle, make_bundle
from adapters.errors import AdapterDoesNotFit, AdapterError, AdapterUnreadable, AdapterUnsupported
from adapters.formats import peft
from adapters.formats.read import read_bundle
from adapters.spec import AdapterSpec, ModuleSpec
from adapters.tensors import AdapterTensor, read_safetensors

BLOCK = {"self_attn.q_proj": (10, 6), "self_attn.k_proj": (4, 6), "mlp.down_proj": (6, 14)}
LAYERS = {f"model.layers.{i}.{name}": shape for i in range(12) for name, shape in BLOCK.items()} | {"lm_head": (20, 6)}


def targets(**fields: Any) -> dict[str, ModuleSpec]:
    """What a configuration resolves to, whatever tensors are there."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **fields}
    return dict(peft.read({}, config, LAYERS, {}).spec.modules)


def refused(**fields: Any) -> AdapterUnsupported:
    with pytest.raises(AdapterUnsupported) as caught:
        targets(**fields)
    return caught.value


# ---- targets: PEFT's own rules ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"target_modules": ["q_proj"]}, 12),
        ({"target_modules": ["proj"]}, 0),  # Ends count from a dot on.
        ({"target_modules": ["q_proj", "lm_head", "absent"]}, 13),
        ({"target_modules": ["model.layers.3.mlp.down_proj"]}, 1),
        ({"target_modules": ["1.mlp.down_proj"]}, 1),  # Not 11.
        ({"target_modules": "all-linear"}, 36),
        ({"target_modules": "ALL-LINEAR", "exclude_modules": ["mlp.down_proj"]}, 24),
        ({"target_modules": r".*\.1\d?\..*proj"}, 9),
        ({"target_modules": r"(?:model\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:k_proj|down_proj))"}, 24),
        ({"target_modules": r"^(?!.*self_attn).*_proj$"}, 12),
        ({"target_modules": "q_proj"}, 0),  # A string is matched as a whole.
        ({"target_modules": ["q_proj"], "exclude_modules": r".*\.0\..*"}, 11),
        ({"layers_to_transform": [0, 11, 50]}, 2),
        ({"layers_to_transform": 3}, 1),
        ({"layers_to_transform": []}, 12),
        ({"layers_to_transform": [3], "layers_pattern": "layers"}, 1),
        ({"layers_to_transform": [3], "layers_pattern": ["h", "blocks"]}, 0),
        ({"layers_to_transform": [3], "layers_pattern": ".*|h"}, 0),  # Matches without any number.
        ({"layers_to_transform": [3], "target_modules": ["q_proj", "lm_head"]}, 2),  # An exact name counts anyway.
    ],
)
def test_targets(fields: dict[str, Any], count: int) -> None:
    assert len(targets(**fields)) == count


def test_rank_and_alpha_patterns() -> None:
    found = targets(
        target_modules=["q_proj", "k_proj", "down_proj"],
        rank_pattern={"layers.1.mlp.down_proj": 8, "down_proj": 4, r"^model\.layers\.2\.self_attn.*": 16},
        alpha_pattern={"q_proj": 1, "k_proj|down_proj": 6},
    )
    assert found["model.layers.1.mlp.down_proj"] == ModuleSpec(8, 0.75)
    assert found["model.layers.11.mlp.down_proj"] == ModuleSpec(4, 1.5)
    assert found["model.layers.2.self_attn.q_proj"] == ModuleSpec(16, 0.0625)
    assert found["model.layers.3.self_attn.q_proj"] == ModuleSpec(2, 0.5)
    assert found["model.layers.3.self_attn.k_proj"] == ModuleSpec(2, 3.0)


def test_scales_are_float32() -> None:
    assert targets(r=3, lora_alpha=1)["model.layers.0.self_attn.q_proj"].scale == float(np.float32(1 / 3))
    stabilised = targets(r=8, lora_alpha=16, use_rslora=True, rank_pattern={"k_proj": 2})
    assert stabilised["model.layers.0.self_attn.q_proj"].scale == float(np.float32(16 / np.sqrt(8)))


# ---- what is not served -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("ensure_weight_tying", True, "ensure_weight_tying"),
        ("bias", "lora_only", "Trained biases"),
        ("lora_bias", True, "lora_bias"),
        ("peft_type", "LOHA", "LOHA"),
        ("trainable_token_indices", [1, 2], "trainable_token_indices"),
        ("layer_replication", [[0, 2]], "layer_replication"),
        ("alora_invocation_tokens", [5], "alora_invocation_tokens"),
        ("init_lora_weights", "pissa_niter_16", "changed base"),
        ("init_lora_weights", "magic", "magic"),
        ("init_lora_weights", [[1]], "not known"),
        ("something_new", 0.5, "something_new"),
    ],
)
def test_refusals_name_the_field(field: str, value: object, sentence: str) -> None:
    error = refused(**{field: value})
    assert error.fields == (field,) and sentence in error.message


def test_all_refusals_come_at_once() -> None:
    error = refused(lora_bias=True, bias="all", trainable_token_indices=[1])
    assert set(error.fields) == {"lora_bias", "bias", "trainable_token_indices"} and len(error.reasons) == 3


def test_a_configuration_as_peft_saves_it_is_accepted() -> None:
    """Every field of PEFT 0.18, with the values it writes when they were not set."""
    neutral = {
        "alora_invocation_tokens": None,
        "alpha_pattern": {},
        "arrow_config": None,
        "auto_mapping": None,
        "base_model_name_or_path": "org/model",
        "bias": "none",
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_bias": False,
        "lora_dropout": 0.05,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_version": "0.18.0",
        "qalora_group_size": 16,
        "rank_pattern": {},
        "revision": None,
        "target_parameters": None,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": None,
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": False,
    }
    assert len(targets(**neutral)) == 12


# ---- what cannot be meant -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"r": 0}, "r must be a rank from 1"),
        ({"r": "8"}, "r must be a rank from 1"),
        ({"r": True}, "r must be a rank from 1"),
        ({"r": 10**400}, "r must be a rank from 1"),
        ({"r": None}, "r must be a rank from 1"),
        ({"lora_alpha": None}, "lora_alpha must be a number"),
        ({"lora_alpha": "16"}, "lora_alpha must be a number"),
        ({"lora_alpha": float("nan")}, "not a finite float32"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a number"),
        ({"use_rslora": "yes"}, "use_rslora must be true or false"),
        ({"use_dora": 1}, "use_dora must be true or false"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern must be a rank"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern must map"),
        ({"alpha_pattern": {"(": 2}}, "not a regular expression"),
        ({"target_modules": None}, "target_modules is missing"),
        ({"target_modules": []}, "target_modules is missing"),
        ({"target_modules": [1]}, "target_modules must be a list of names"),
        ({"target_modules": {"q": 1}}, "target_modules must be a list of names"),
        ({"target_modules": "*"}, "not a regular expression"),
        ({"target_modules": "(" * 3000 + ")" * 3000}, "characters"),
        ({"target_modules": "(" * 2000 + ")" * 2000}, "not a regular expression"),
        ({"target_modules": "((a{999}){999}){999}"}, "repeats too much"),
        ({"target_modules": "[é-\U0010ffff]" * 400}, "ranges beyond"),
        ({"target_modules": "(?i)" + r"[a-\U0010ffff]" * 250}, "ranges beyond"),
        ({"target_modules": "(foo){e<=3}"}, "braces"),
        ({"target_modules": r"(a|aa)+$", "rank_pattern": {}}, None),
        ({"target_modules": "q_proj", "layers_to_transform": [1]}, "need target_modules to be a list"),
        ({"layers_to_transform": ["1"]}, "layer numbers"),
        ({"layers_to_transform": {"a": 1}}, "layer numbers"),
    ],
)
def test_unusable_configurations(fields: dict[str, Any], sentence: str | None) -> None:
    if sentence is None:
        assert not targets(**fields)
        return
    with pytest.raises(AdapterUnreadable, match=sentence):
        targets(**fields)


def test_an_expression_that_never_ends_is_stopped() -> None:
    layers = {"a" * 64: (2, 2)}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": "(a|aa)+b"}
    with pytest.raises(AdapterUnreadable, match="take too long"):
        peft.read({}, config, layers, {})


def test_how_torch_stores_a_layer_does_not_matter() -> None:
    assert targets(fan_in_fan_out=True) == targets()


def test_two_adapters_or_two_spellings_in_one_file() -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
    a, b = np.zeros((2, 4), np.float32), np.zeros((3, 2), np.float32)
    two = {"q.lora_A.default.weight": a, "q.lora_B.other.weight": b}
    with pytest.raises(AdapterUnreadable, match=r"2 adapters \(default, other\)"):
        read_bundle(save(two), config, layers={"q": (3, 4)})
    twice = {"q.lora_A.weight": a, "base_model.model.q.lora_A.weight": a, "q.lora_B.weight": b}
    with pytest.raises(AdapterDoesNotFit, match=r"q\.lora_A\.weight is there twice"):
        read_bundle(save(twice), config, layers={"q": (3, 4)})


def test_random_configurations_never_crash() -> None:
    random = np.random.default_rng(1)
    values: list[Any] = [None, True, 0, -1, 3, 1e400, "x", "(", ".*", [], ["q_proj"], [None], {}, {"q_proj": "x"}, [[]]]
    fields = sorted(peft.READ | {"use_dora", "bias", "new"})
    for _ in range(2000):
        chosen = random.choice(fields, size=random.integers(1, 4), replace=False)
        config = {str(field): values[random.integers(len(values))] for field in chosen}
        try:
            targets(**config)
        except AdapterError as error:
            assert error.message


# ---- written again ------------------------------------------------------------------------------------------------


def mixed_bundle() -> AdapterBundle:
    """Ranks, scales and dtypes that differ from layer to layer."""
    random = np.random.default_rng(2)
    modules, tensors = {}, {}
    for i, (path, (out, width)) in enumerate(LAYERS.items()):
        rank, dtype = 1 + i % 3, ("F32", "F16", "BF16")[i % 3]
        modules[path] = ModuleSpec(rank, float(np.float32((0.3, 2.0, 16 / np.sqrt(8), -1.5)[i % 4])))
        for half, shape in (("lora_A", (rank, width)), ("lora_B", (out, rank))):
            array = random.normal(size=shape).astype("<f4")
            if dtype == "F16":
                array = array.astype("<f2")
            elif dtype == "BF16":
                array = (array.view("<u4") >> 16).astype("<u2")
            tensors[f"{path}.{half}"] = AdapterTensor(dtype, array)
    return make_bundle(AdapterSpec("lora", modules), tensors)


def test_what_is_written_reads_back_to_the_same_digest() -> None:
    bundle = mixed_bundle()
    weights, config = peft.write(bundle)
    assert read_bundle(weights, json.loads(json.dumps(config)), layers=LAYERS).digest == bundle.digest
    assert read_bundle(weights, None, layers=LAYERS, format="peft").digest == bundle.digest
    tensors, metadata = read_safetensors(weights)
    assert metadata["format"] == "pt" and len(tensors) == 2 * len(LAYERS)
