"""What `push` takes of torch and PEFT: tensors of every dtype without a copy, and models as PEFT saves them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load

from trainer_client.adapter.sources import adapter_of
from trainer_client.adapter.tensors import host_tensor, host_tensors, safetensors_body
from trainer_client.verbs import publishing, sampling


def small(**changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32, **changes
    )
    return transformers.LlamaForCausalLM(config)


OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "down_proj"]},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "dora": {"target_modules": r".*self_attn\.(q|v)_proj", "use_dora": True},
    "patterns": {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_torch_tensors_keep_their_bits_and_their_memory(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 5).to(dtype).requires_grad_()
    tensors = {"a": tensor, "turned": tensor.detach().T, "cut": tensor.detach()[:, 1:3], "one": tensor.detach()[0, 0]}
    read = load(bytes(safetensors_body(host_tensors(tensors), {})))
    for name, given in tensors.items():
        assert read[name].dtype == dtype and torch.equal(read[name], given.detach()), name
    assert host_tensor("a", tensor).array.ctypes.data == tensor.data_ptr()


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz], ids=str
)
def test_what_no_adapter_is_served_in_becomes_the_float32_that_it_stands_for(dtype: torch.dtype) -> None:
    given = torch.tensor([[0.5, -1.75, 0.0], [2.0, 0.125, -0.25]]).to(dtype)
    tensor = host_tensor("x", given.requires_grad_(dtype == torch.float64))
    assert (tensor.dtype, tensor.was) == ("F32", str(dtype).removeprefix("torch."))
    assert tensor.array.tolist() == [[0.5, -1.75, 0.0], [2.0, 0.125, -0.25]]


@pytest.mark.parametrize("made", [lambda t: t.to("meta"), torch.Tensor.to_sparse], ids=["meta", "sparse"])
def test_tensors_that_cannot_be_read_are_named(made: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with pytest.raises(TypeError, match=r"'layer\.q', a Tensor, cannot be read here: "):
        host_tensor("layer.q", made(torch.ones(2, 3)))


def test_ids_and_options_of_torch() -> None:
    ids = torch.tensor([[1, 2], [3, 4]])
    options: Any = {"logit_bias": {torch.tensor(5): torch.tensor(0.5, dtype=torch.bfloat16)}, "seed": torch.tensor(7)}
    sent = json.loads(bytes(sampling.rollouts(ids, stop_token_ids=ids[0], **options).body))
    assert sent["prompts"] == [{"token_ids": [1, 2]}, {"token_ids": [3, 4]}]
    assert sent["sampling"] == {"logit_bias": {"5": 0.5}, "seed": 7, "stop_token_ids": [1, 2]}
    with pytest.raises(TypeError, match=r"^seed is a Tensor that cannot be read here"):
        sampling.rollouts(ids, seed=torch.zeros(3, device="meta"))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", list(OPTIONS))
def test_a_peft_model_is_what_it_would_save(kind: str, tmp_path: Path) -> None:
    model = peft.get_peft_model(small(), peft.LoraConfig(r=4, lora_alpha=8, **OPTIONS[kind]))
    model.save_pretrained(tmp_path)
    saved, given = publishing.push("policy", tmp_path), publishing.push("policy", model)
    assert load(bytes(given.body)).keys() == load(bytes(saved.body)).keys()
    tensors = peft.get_peft_model_state_dict(model)
    held = publishing.push("policy", tensors, model.peft_config["default"])
    digests = [call.parse.keywords["sent_digest"] for call in (saved, given, held)]  # type: ignore[attr-defined]
    assert len(set(digests)) == 1 and digests[0].startswith("sha256:")


def test_bfloat16_models_and_one_of_several_adapters() -> None:
    model = peft.get_peft_model(small().to(torch.bfloat16), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    assert {tensor.dtype for tensor in adapter_of(model, None)[0].values()} == {"BF16"}
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["v_proj"]))
    model.set_adapter("second")
    host, config = adapter_of(model, None)
    assert config["r"] == 2 and all(".v_proj." in name and "second" not in name for name in host)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="2 active adapters"):
        adapter_of(model, None)


def test_an_adapted_embedding_does_not_bring_the_bases_table() -> None:
    model = peft.get_peft_model(small(), peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    host, _ = adapter_of(model, None)
    assert all("lora_" in name for name in host)
    assert any("lora_embedding_A" in name for name in host)


def test_an_adapter_of_transformers_own_loader_is_taken_too() -> None:
    model = small()
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    host, config = adapter_of(model, None)
    assert config["r"] == 4 and len(host) == 4
    wrapped = peft.get_peft_model(small(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    wrapped.load_state_dict({f"base_model.model.{name}": value for name, value in model.state_dict().items()})
    digests = [publishing.push("p", each).parse.keywords["sent_digest"] for each in (model, wrapped)]  # type: ignore[attr-defined]
    assert digests[0] == digests[1]


def test_a_plain_torch_model_is_no_adapter() -> None:
    with pytest.raises(TypeError, match="not Linear"):
        publishing.push("p", torch.nn.Linear(2, 2))
