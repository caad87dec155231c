"""Text and pictures in the controller, which has no model: the tokenizer, the grammars and the image processor of the
directory that replicas load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from rollout_server.engine.messages.options import ModelInfo
from rollout_server.engine.model.vision.reader import read_pictures_for
from rollout_server.engine.sampling.grammars import Grammars
from rollout_server.text.pictures.reader import PictureReader


def load_tokenizer(path: Path, info: ModelInfo) -> tuple[Any, Grammars | None, PictureReader | None]:
    """transformers' tokenizer, what compiles grammars for it, and what reads pictures; blocks while it reads files. An
    encoder has no grammars, and only a model that sees reads pictures."""
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    grammars = None if info.encoder else Grammars(tokenizer, info.vocab_size, info.eos_token_ids)
    pictures = None if info.placeholder is None else read_pictures_for(path, tokenizer)
    return tokenizer, grammars, pictures
