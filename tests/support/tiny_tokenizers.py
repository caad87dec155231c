"""Tiny tokenizers, one for each way that published ones turn tokens into text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BYTES = 3
"""Id of byte 0 where every byte is a token."""
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
PRINTABLE = tuple(map(chr, range(33, 127)))


def _fast(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    """With a token that is no word but stays in the text, and one that takes the spaces around it."""
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    mask = AddedToken("<mask>", lstrip=True, rstrip=True, special=True)
    made.add_special_tokens({"additional_special_tokens": [mask]})
    made.add_tokens(["<think>"])
    return made


def _byte_fallback(decoder: Any) -> PreTrainedTokenizerFast:
    """Every character a token, `▁` for a space, byte tokens for the rest, and some longer tokens."""
    words = ("▁a", "▁the", "你", "\ufffd", "▁▁")
    tokens = ("<unk>", "</s>", "<s>", *BYTE_TOKENS, "▁", *PRINTABLE, *words)
    made = Tokenizer(
        models.BPE({token: id for id, token in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True)
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoder
    made.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 2)])
    return _fast(made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def spaces() -> PreTrainedTokenizerFast:
    """As Llama 2, Mistral and Phi-3: `decode` drops the space in front of the first word."""
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return _byte_fallback(decoders.Sequence(parts))


def unstripped() -> PreTrainedTokenizerFast:
    """As Gemma."""
    return _byte_fallback(decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]))


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3 and Qwen: some tokens hold parts of characters, one a part of one and the next character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("ä", "½"), ("ł", "a"), ("ð", "Ł"), ("Ģ", "Ġ")]
    tokens = ("<|pad|>", "<|end|>", "<|user|>", *alphabet, *(left + right for left, right in merges))
    made = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return _fast(made, eos_token="<|end|>", pad_token="<|pad|>")


def metaspace() -> PreTrainedTokenizerFast:
    """As T5 and XLM-R."""
    words = ("<unk>", "</s>", "▁", *PRINTABLE, "▁a", "▁the", "▁cat", "你", "é", "▁▁b")
    made = Tokenizer(models.Unigram([(word, -float(at)) for at, word in enumerate(words)], unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return _fast(made, eos_token="</s>", unk_token="<unk>")


def _word_piece(cleanup: bool) -> PreTrainedTokenizerFast:
    words = ("[UNK]", "[SEP]", "a", "b", "##a", "##b", "hello", "##ing", ",", ".", "'", "n't", "你")
    made = Tokenizer(models.WordPiece({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=cleanup)
    return _fast(made, eos_token="[SEP]", unk_token="[UNK]")


def word_piece() -> PreTrainedTokenizerFast:
    """As BERT without its tidying."""
    return _word_piece(cleanup=False)


def tidied_word_piece() -> PreTrainedTokenizerFast:
    """As BERT: spaces before punctuation go, in its decoder and once more in transformers."""
    made = _word_piece(cleanup=True)
    made.clean_up_tokenization_spaces = True
    return made


def suffixed() -> PreTrainedTokenizerFast:
    """As GPT: a token says that its word ends, and the next one writes the space."""
    words = ("<unk>", "</s>", "a</w>", "b", "c</w>", "d", "你", "é</w>")
    made = Tokenizer(models.BPE({word: at for at, word in enumerate(words)}, [], unk_token="<unk>"))
    made.decoder = decoders.BPEDecoder(suffix="</w>")
    return _fast(made, eos_token="</s>", unk_token="<unk>")


def plain_words() -> PreTrainedTokenizerFast:
    """Whole words and no decoder: spaces stand between all."""
    words = ("<unk>", "</s>", "one", "two", "!")
    made = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return _fast(made, eos_token="</s>", unk_token="<unk>")


KINDS: Mapping[str, Callable[[], PreTrainedTokenizerFast]] = MappingProxyType(
    {
        make.__name__: make
        for make in (
            byte_level,
            spaces,
            unstripped,
            metaspace,
            word_piece,
            tidied_word_piece,
            suffixed,
            plain_words,
        )
    }
)


def give(tokenizer: PreTrainedTokenizerFast, model: Path) -> Path:
    """Puts the tokenizer in the place of a model's own, whose vocabulary must have room for it."""
    if json.loads((model / "config.json").read_text())["vocab_size"] < len(tokenizer):
        raise ValueError(f"{model} has no room for {len(tokenizer)} tokens.")
    tokenizer.save_pretrained(model)
    return model
