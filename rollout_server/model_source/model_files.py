"""Finds the directory of `--model`: one that is here, a Hub id, or the embedded model; and says what is wrong with it
before anything heavy begins."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from rollout_server.errors import InvalidField
from rollout_server.model_source import hub
from rollout_server.quoting import quoted

EMBEDDED_ID = "rollout-demo"
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.npz", "*.h5", "*.safetensors")
GIVE = (
    "Give the directory that holds config.json, model*.safetensors and the tokenizer, or a Hub id as OWNER/NAME; "
    "without a model the embedded one is served."
)
NAMED = 3
"""Files that a sentence lists."""


def resolve_model(model: str | None, revision: str | None = None) -> tuple[Path, str]:
    """(directory, id) of `model`, downloading it if need be; None is the embedded one. Raises `InvalidField` with what
    to do if there is none, `EngineUnavailable` if the Hub cannot be had now."""
    if model is None:
        path = Path(str(files("rollout_server"))) / "demo" / "model"
        if not (path / "config.json").is_file():
            raise InvalidField("The embedded demo model is not installed; name a model with --model.", param="model")
        return path, EMBEDDED_ID
    local = Path(model).expanduser()
    if local.is_dir():
        if revision is not None:
            raise InvalidField(
                f"{local} is a directory, which has no revision {quoted(revision)}: leave out --revision, or name a "
                "model of the Hub.",
                param="revision",
            )
        check_files(local, str(local))
        return local, local.resolve().name
    if local.exists():
        raise InvalidField(
            f"{local} is a file: --model takes the directory that holds config.json, model*.safetensors and the "
            "tokenizer, or a Hub id.",
            param="model",
        )
    if local.is_absolute() or model.startswith(("~", ".")) or model.count("/") > 1:
        raise InvalidField(f"There is no directory {local}. {GIVE}", param="model")
    fetched = hub.fetch(model, revision)
    check_files(fetched, model)
    return fetched, model


def check_files(directory: Path, name: str) -> None:
    """Returns whether what mlx-lm reads is there. Raises `InvalidField` that says what is there instead."""
    if not (directory / "config.json").is_file():
        if (directory / "adapter_config.json").is_file():
            raise InvalidField(
                f"{name} is an adapter and no model: serve its base with --model, and this one with "
                "--adapter NAME=DIR.",
                param="model",
            )
        raise InvalidField(f"{name} holds no config.json, so it is no model directory. {GIVE}", param="model")
    if any(directory.glob("model*.safetensors")):
        return
    others = sorted({path.name for pattern in OTHER_WEIGHTS for path in directory.glob(pattern)})
    listed = f", only {', '.join(others[:NAMED])}{', …' if len(others) > NAMED else ''}" if others else ""
    raise InvalidField(
        f"{name} holds no weights in model*.safetensors{listed}. Pickles and other formats are not read: use a copy in "
        "safetensors, which `save_pretrained` of transformers and `mlx_lm.convert` write.",
        param="model",
    )
