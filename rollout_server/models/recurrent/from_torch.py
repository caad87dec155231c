"""A model directory of the LSTM that a torch module holds: its state dict in, config.json and weights out.

    python -m rollout_server.models.recurrent.from_torch STATE.safetensors DIRECTORY --embedding … --lstm … --head …

The module has an `Embedding`, an `LSTM` and a `Linear` from its outputs to the vocabulary, under these names; without a
head the embedding's weight is one. Sizes follow from the tensors. Neither torch nor a tokenizer is needed: copy the
files of the tokenizer into the directory, or name the tokens that end a row with `--eos-token-id`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from rollout_server.models.recurrent.lstm import EMBEDDING, HEAD, parameter_name

OF_TORCH = re.compile(r"(weight|bias)_(ih|hh)_l(\d+)")


def convert(
    state: Mapping[str, mx.array],
    directory: Path,
    *,
    embedding: str = "embedding",
    lstm: str = "lstm",
    head: str = "head",
    eos_token_id: int | Sequence[int] | None = None,
) -> Path:
    """Writes `directory`, made if missing, and returns it. Raises `ValueError` for what no layer here computes, for
    what is left over, and for what is missing."""
    weights = file_names(state, embedding=embedding, lstm=lstm, head=head)
    config = config_of(weights) | ({} if eos_token_id is None else {"eos_token_id": eos_token_id})
    directory.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "mlx"})
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return directory


def file_names(state: Mapping[str, Any], *, embedding: str, lstm: str, head: str) -> dict[str, Any]:
    """The tensors of a torch module under the names that they have in a file. Raises `ValueError` as `convert` does."""
    places = {f"{embedding}.weight": EMBEDDING, f"{head}.weight": f"{HEAD}.weight", f"{head}.bias": f"{HEAD}.bias"}
    found: dict[str, Any] = {}
    for name, value in sorted(state.items()):
        part = OF_TORCH.fullmatch(name.removeprefix(f"{lstm}.")) if name.startswith(f"{lstm}.") else None
        if part is not None:
            found[f"model.layers.{part[3]}.{part[1]}_{part[2]}"] = value
        elif name in places:
            found[places[name]] = value
        elif name.endswith("_reverse"):
            raise ValueError(f"{name} reads backwards: a bidirectional LSTM gives no next token.")
        elif "weight_hr" in name:
            raise ValueError(f"{name} is a projection of the outputs (proj_size), which is not served.")
        else:
            raise ValueError(f"{name} is of none of {embedding}, {lstm} and {head}: leave it out, or name its module.")
    missing = {EMBEDDING: embedding, "model.layers.0.weight_hh": lstm}
    if absent := [module for tensor, module in missing.items() if tensor not in found]:
        raise ValueError(f"Nothing in this state dict is of {' or '.join(absent)}.")
    return found


def pushed_names(state: Mapping[str, Any], *, embedding: str, lstm: str, head: str) -> dict[str, Any]:
    """The tensors of a torch module, or changes of them, under the names that a version gives them whose configuration
    has the kind `full` or `delta`. Raises `ValueError` as `convert` does."""
    named = file_names(state, embedding=embedding, lstm=lstm, head=head)
    return {parameter_name(name): value for name, value in named.items()}


def config_of(weights: Mapping[str, Any]) -> dict[str, Any]:
    """config.json, from the shapes of a file's tensors."""
    vocabulary, width = weights[EMBEDDING].shape
    layers = {name.split(".")[2] for name in weights if name.startswith("model.layers.")}
    return {
        "architectures": ["LSTMForCausalLM"],
        "model_type": "lstm",
        "vocab_size": vocabulary,
        "hidden_size": weights["model.layers.0.weight_hh"].shape[1],
        "num_hidden_layers": len(layers),
        "embedding_size": width,
        "bias": "model.layers.0.bias_ih" in weights,
        "head_bias": f"{HEAD}.bias" in weights,
        "tie_word_embeddings": f"{HEAD}.weight" not in weights,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes a model directory from the state dict of a torch LSTM.")
    parser.add_argument("state", type=Path, help="a safetensors file")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--embedding", default="embedding", help="what the module calls its Embedding")
    parser.add_argument("--lstm", default="lstm", help="what the module calls its LSTM")
    parser.add_argument("--head", default="head", help="what the module calls its Linear")
    parser.add_argument("--eos-token-id", type=int, action="append", help="a token that ends a row")
    chosen = parser.parse_args()
    try:
        state: dict[str, mx.array] = mx.load(str(chosen.state))  # type: ignore[assignment]
        names = {"embedding": chosen.embedding, "lstm": chosen.lstm, "head": chosen.head}
        sys.stdout.write(f"{convert(state, chosen.directory, eos_token_id=chosen.eos_token_id, **names)}\n")
    except (OSError, RuntimeError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
