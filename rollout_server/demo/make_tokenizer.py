"""The embedded model's tokenizer: byte-level BPE, so any text encodes and decodes; digits are always single tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|im_end|>"
START = "<|im_start|>"
PAD = "<|pad|>"

CHAT_TEMPLATE = (
    "{%- if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(corpus: Iterable[str], merges: int) -> Tokenizer:
    """A tokenizer with the three special tokens, the 256 bytes and up to `merges` merges learned from `corpus`."""
    tokenizer = Tokenizer(models.BPE())
    # Digits come first: a number is then read and written one digit at a time, whatever stands around it.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True, normalized=False) for text in (PAD, END, START)]
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(special) + merges,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer=trainer)
    return tokenizer


def special_id(tokenizer: Tokenizer, text: str) -> int:
    """The id of a special token. Raises `ValueError` if the tokenizer has none of that name."""
    number = tokenizer.token_to_id(text)
    if number is None:
        raise ValueError(f"The tokenizer has no token {text!r}.")
    return int(number)


def write_tokenizer(tokenizer: Tokenizer, directory: Path, context_length: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json as transformers reads them."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [START],
        "model_max_length": context_length,
        # Anything else would change the decoded text behind the model's back.
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
