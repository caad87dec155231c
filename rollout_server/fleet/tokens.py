"""Text in the controller, which has no model: the tokenizer and grammars of the directory that replicas load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from rollout_server.engine.messages.options import ModelInfo
from rollout_server.engine.sampling.grammars import Grammars


def load_tokenizer(path: Path, info: ModelInfo) -> tuple[Any, Grammars | None]:
    """transformers' tokenizer and what compiles grammars for it; blocks while it reads files. An encoder has none."""
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    grammars = None if info.encoder else Grammars(tokenizer, info.vocab_size, info.eos_token_ids)
    return tokenizer, grammars
