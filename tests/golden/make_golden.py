"""Writes the golden files: tiny models, PEFT adapters on them, and the log-probabilities, pooled hidden states and
label scores that torch and PEFT give.

`make golden`, or `python -m tests.golden.make_golden [FAMILY…]` where torch and peft are installed. Weights are float16
in the files and float32 in both computations: every value was rounded before it was used.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForSequenceClassification

from tests.support import tiny_models
from tests.support.peers import families, reference

HERE = Path(__file__).parent
SMALL = {"hidden_size": 32, "intermediate_size": 44, "max_position_embeddings": 256}
HEADS = {"head_dim": 12}
CHOSEN: dict[str, dict[str, Any]] = {
    "llama": HEADS,
    "mistral": HEADS,
    "qwen2": {},
    "qwen3": HEADS,
    "qwen3_moe": {**HEADS, "moe_intermediate_size": 20},
    "gemma2": {**HEADS, "query_pre_attn_scalar": 12},
    "gemma3_text": {**HEADS, "query_pre_attn_scalar": 12, "hidden_size": 16},
    "phi3": {"original_max_position_embeddings": 256},
    "mixtral": {},
    "olmo2": {},
    "gpt_oss": HEADS,
    "granite": {},
    "xlstm": {"num_heads": 2, "use_bias": True},
}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
EXTRA: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "patterns": {
            "r": 3,
            "lora_alpha": 5,
            "target_modules": r".*\.(q_proj|o_proj|up_proj|lm_head|embed_tokens)",
            "rank_pattern": {"q_proj": 6, r"layers\.1\.mlp\.up_proj": 2},
            "alpha_pattern": {"o_proj": 9},
        },
    },
    "gpt_oss": {"experts": {"r": 3, "lora_alpha": 5, "target_modules": ["v_proj"], "target_parameters": EXPERTS}},
}
LENGTHS = (29, 13, 2)
LABELS = 2
WITHOUT_CLASSES = frozenset({"granite", "xlstm"})
"""Families of which transformers has no classifier."""


def main() -> None:
    for family in sys.argv[1:] or CHOSEN:
        with tempfile.TemporaryDirectory() as place:
            write(family, Path(place), HERE / family)


def write(family: str, scratch: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    families.build(family, scratch, grid=torch.float16, **SMALL | CHOSEN[family])
    save_file(halved(load_file(scratch / "model.safetensors")), target / "model.safetensors")
    shutil.copy(scratch / "config.json", target)
    generator = np.random.default_rng(11)
    prompts = [generator.integers(0, tiny_models.VOCAB_SIZE, size=length).tolist() for length in LENGTHS]
    found = {"prompts": np.concatenate(prompts).astype(np.int32), "lengths": np.array(LENGTHS, np.int32)}
    base = families.load(scratch)
    found["base"] = np.concatenate(reference.logprobs(base, prompts))
    found |= pooled("base", base, prompts)
    for kind, options in (reference.KINDS | EXTRA.get(family, {})).items():
        if kind == "dora" and families.FAMILIES[family].experts:
            options = {**options, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
        model = reference.adapted(scratch, grid=torch.float16, **options)
        model.save_pretrained(scratch / kind, save_embedding_layers=False)
        save_adapter(scratch / kind, target / f"{kind}.safetensors")
        found[kind] = np.concatenate(reference.logprobs(model, prompts))
        found |= pooled(kind, model, prompts)
    save_file(found, target / "reference.safetensors")
    if family not in WITHOUT_CLASSES:
        write_heads(family, scratch, target, prompts)


def write_heads(family: str, scratch: Path, target: Path, prompts: list[list[int]]) -> None:
    """A reward adapter with its head, the scores that PEFT gives with it, and those of the bare model with its head."""
    auto, options = AutoModelForSequenceClassification, dict(reference.KINDS["lora"])
    if families.FAMILIES[family].experts:
        options["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = reference.adapted(scratch, grid=torch.float16, auto=auto, num_labels=LABELS, task_type="SEQ_CLS", **options)
    model.save_pretrained(scratch / "reward", save_embedding_layers=False)
    save_adapter(scratch / "reward", target / "reward.safetensors")
    bare = families.load(scratch, auto, num_labels=LABELS)
    head = load_file(scratch / "reward" / "adapter_model.safetensors")["base_model.model.score.weight"]
    bare.score.weight.data = torch.from_numpy(head)
    found = {"reward": reference.scores(model, prompts), "bare": reference.scores(bare, prompts)}
    save_file(found, target / "heads.safetensors")


def save_adapter(saved: Path, target: Path) -> None:
    """What PEFT left in a directory as one file."""
    config = json.loads((saved / "adapter_config.json").read_text())
    config = {field: sorted(value) if isinstance(value, list) else value for field, value in config.items()}
    metadata = {"adapter_config": json.dumps({**config, "base_model_name_or_path": None}, sort_keys=True)}
    save_file(halved(load_file(saved / "adapter_model.safetensors")), target, metadata=metadata)


def pooled(kind: str, model: torch.nn.Module, prompts: list[list[int]]) -> dict[str, np.ndarray]:
    return {f"{kind}, {how}": vectors for how, vectors in reference.embeddings(model, prompts).items()}


def halved(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    small = {name: value.astype(np.float16) for name, value in tensors.items()}
    for name, value in tensors.items():
        if not np.array_equal(small[name].astype(value.dtype), value):
            raise ValueError(f"{name} holds values that float16 does not have.")
    return small


if __name__ == "__main__":
    main()
