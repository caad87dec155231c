"""Weights as transformers saves them that the family's `sanitize` does not take, or drops."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import mlx.core as mx

from rollout_server.engine.model.checkpoint.family import Family


def classes_of(family: Family) -> Callable[[dict[str, Any]], tuple[Any, Any]]:
    """What `load_model` takes as `get_model_classes`: the family's own classes, the model's `sanitize` given the
    layout that it knows."""
    module = import_module(f"{family.package}.{family.module}")
    if family.module not in LAYOUTS:
        return lambda config: (module.Model, module.ModelArgs)

    class Model(module.Model):  # type: ignore[name-defined]
        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            return super().sanitize(LAYOUTS[family.module](weights, self.args))

    return lambda config: (Model, module.ModelArgs)


def _gpt_oss(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Experts [experts, in, out] as transformers trains and saves them, gate and up in turn, → [experts, out, in], gate
    and up apart. Those packed as mxfp4 have other names."""
    found: dict[str, mx.array] = {}
    for name, value in weights.items():
        layer, _, part = name.rpartition(".experts.")
        match part:
            case "gate_up_proj" | "gate_up_proj_bias":
                turned, end = (value.swapaxes(-1, -2), "weight") if part == "gate_up_proj" else (value, "bias")
                found[f"{layer}.experts.gate_proj.{end}"] = mx.contiguous(turned[:, 0::2])
                found[f"{layer}.experts.up_proj.{end}"] = mx.contiguous(turned[:, 1::2])
            case "down_proj":
                found[f"{layer}.experts.down_proj.weight"] = mx.contiguous(value.swapaxes(-1, -2))
            case "down_proj_bias":
                found[f"{layer}.experts.down_proj.bias"] = value
            case _:
                found[name] = value
    return found


def _gpt_oss_if_stacked(weights: dict[str, mx.array], args: Any) -> dict[str, mx.array]:
    return _gpt_oss(weights) if any(name.endswith(".experts.gate_up_proj") for name in weights) else weights


def _gpt2(weights: dict[str, mx.array], args: Any) -> dict[str, mx.array]:
    """Without the name of the trunk, which the first published files lack and the class adds by itself, and without
    the masks that old files hold."""
    return {name.removeprefix("transformer."): value for name, value in weights.items()}


def _ernie_moe(weights: dict[str, mx.array], args: Any) -> dict[str, mx.array]:
    """The class leaves these weights out, so that it would choose other experts."""
    for name, value in weights.items():
        if name.endswith("e_score_correction_bias") and mx.any(value != 0):
            raise ValueError(f"{name} is not zero, and mlx-lm's ernie4_5_moe chooses experts without it")
    return weights


def _falcon_h1(weights: dict[str, mx.array], args: Any) -> dict[str, mx.array]:
    """Keys and values multiplied as config.json says. The class multiplies such factors into the weights when it reads
    files of transformers, but looks for keys under a name that they do not have, and forgets values and biases."""
    if args.mamba_rms_norm and args.mamba_n_groups > 1:
        raise ValueError(f"mamba_n_groups is {args.mamba_n_groups}, and mlx-lm's norm is not that of a group")
    convolution = weights["model.layers.0.mamba.conv1d.weight"]
    converted = convolution.shape[-1] <= convolution.shape[1]
    factors = {".k_proj.weight": args.key_multiplier, ".v_proj.weight": args.attention_in_multiplier}
    if converted and any(factor != 1.0 for factor in factors.values()):
        raise ValueError(
            f"key_multiplier is {args.key_multiplier}, attention_in_multiplier {args.attention_in_multiplier}, which "
            "mlx-lm leaves out of a falcon_h1 that it converts: take the files that transformers wrote"
        )
    if any(name.endswith("_proj.bias") for name in weights):
        raise ValueError("mlx-lm's falcon_h1 does not multiply biases as config.json says")
    if converted:
        return weights
    scaled = dict(weights)
    for name, value in weights.items():
        for end, factor in factors.items():
            if name.endswith(end):
                scaled[name] = value * factor
    return scaled


def _beside_vision(weights: dict[str, mx.array], args: Any) -> dict[str, mx.array]:
    """Idefics3 and SmolVLM have other names for the parts beside the decoder, and for the decoder itself."""
    kept = {name: value for name, value in weights.items() if not name.startswith(VISION)}
    return {name.replace("model.text_model.", "model.", 1): value for name, value in kept.items()}


def _gemma3(weights: dict[str, mx.array], args: Any) -> dict[str, mx.array]:
    """With the decoder under the name that the class looks for. Releases of transformers around 4.55 put all but the
    output layer into `model`."""
    inside = "model.language_model."
    if not any(name.startswith(inside) for name in weights):
        return weights
    kept = {name: value for name, value in weights.items() if name.startswith((inside, "lm_head."))}
    return {"language_model." + name.replace(inside, "model.", 1): value for name, value in kept.items()}


def _qwen3_vl_moe(weights: dict[str, mx.array], args: Any) -> dict[str, mx.array]:
    """Experts [experts, out, in] as transformers 5 saves them → [experts, in, out] as in the published files, which is
    what the class takes. Raises `ValueError` where both would fit, and nothing says which it is."""
    hidden, inner = args.text_config["hidden_size"], 2 * args.text_config["moe_intermediate_size"]
    names = [name for name in weights if name.endswith(".experts.gate_up_proj")]
    if not names or weights[names[0]].shape[-1] != hidden:
        return weights
    if hidden == inner:
        raise ValueError(f"{names[0]} is as wide as it is high, and may be stored either way")
    ends = (".experts.gate_up_proj", ".experts.down_proj")
    return {name: value.swapaxes(-1, -2) if name.endswith(ends) else value for name, value in weights.items()}


VISION = ("model.vision_model.", "model.connector.")
LAYOUTS: dict[str, Callable[[dict[str, mx.array], Any], dict[str, mx.array]]] = {
    "ernie4_5_moe": _ernie_moe,
    "falcon_h1": _falcon_h1,
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "gpt_oss": _gpt_oss_if_stacked,
    "mistral3": _beside_vision,
    "qwen3_vl_moe": _qwen3_vl_moe,
}


def folded_factors(module: Any) -> str:
    """Which factors of config.json mlx-lm multiplied into the weights, a half sentence; empty where there are none.
    What is added to such weights would have to be multiplied as well, which nothing here does."""
    if getattr(module, "model_type", None) != "falcon_h1":
        return ""
    named = {name: value for name, value in vars(module.args).items() if name.endswith(("_multiplier", "_multipliers"))}
    folded = [name for name, value in named.items() if any(factor != 1.0 for factor in _each(value))]
    if not folded:
        return ""
    return f"mlx-lm multiplies {', '.join(folded)} into its weights, and would have to do so with a version's"


def _each(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)
