"""Text from tokens, a few at a time: whole characters, and at the end what `decode` says."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from rollout_server.detokenize import REPLACEMENT, IncrementalText, special_ids

BYTES = 7


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2: a leading space mark that the start drops, and one token a byte for what is not in the vocabulary."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "▁a": 4, "b": 5, "你": 6}
    vocabulary |= {f"<0x{byte:02X}>": BYTES + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


def word_piece_tokenizer() -> PreTrainedTokenizerFast:
    words = ["[UNK]", "[SEP]", "a", "b", "##a", "##b", "hello", "##ing", ",", "."]
    tokenizer = Tokenizer(models.WordPiece(vocab={word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[SEP]", unk_token="[UNK]")


def random_text(generator: random.Random) -> str:
    ranges = ((32, 127), (0x80, 0x800), (0x800, 0xD800), (0x1F300, 0x1F650))
    return "".join(chr(generator.randrange(*generator.choice(ranges))) for _ in range(generator.randrange(1, 30)))


def random_ids(tokenizer: PreTrainedTokenizerFast, kind: str, generator: random.Random) -> list[int]:
    if kind == "byte_fallback":
        # Any text, in byte tokens or not; never an invalid byte, see the test of that.
        ids: list[int] = []
        for character in random_text(generator):
            ordinary = generator.random() < 0.5
            ids += [generator.choice([2, 3, 4, 5, 6])] if ordinary else [BYTES + b for b in character.encode()]
        return ids
    if kind == "byte_level" and generator.random() < 0.5:
        return list(tokenizer.encode(random_text(generator), add_special_tokens=False))
    return [generator.randrange(len(tokenizer)) for _ in range(generator.randrange(1, 120))]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "word_piece"])
@pytest.mark.parametrize("skip", [True, False])
def test_the_pieces_add_up_to_what_decode_says(kind: str, skip: bool, tokenizer: PreTrainedTokenizerFast) -> None:
    made = {"byte_fallback": byte_fallback_tokenizer, "word_piece": word_piece_tokenizer}
    chosen = made[kind]() if kind in made else tokenizer
    generator = random.Random(f"{kind}/{skip}")
    for _ in range(250):
        ids = random_ids(chosen, kind, generator)
        whole = chosen.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        text = IncrementalText(chosen, skip_special_tokens=skip)
        pieces, at = "", 0
        while at < len(ids):
            step = generator.choice([1, 1, 1, 2, 5, 200])
            pieces += text.push(ids[at : at + step])
            at += step
            assert whole.startswith(pieces)
            assert text.text == pieces
            assert text.length == len(pieces)
            assert text.tail(5) == pieces[-5:]
        pieces += text.finish()
        assert pieces == text.text == whole
        assert not text.pending


def test_a_character_waits_for_its_last_byte(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("a", "ð", "Ł", "ĺ", "Ģ", "b")]  # a😀b
    text = IncrementalText(tokenizer)
    assert [text.push([id]) for id in ids] == ["a", "", "", "", "😀", "b"]


def test_every_prefix_shows_whole_characters_only(tokenizer: PreTrainedTokenizerFast) -> None:
    generator = random.Random(3)
    for _ in range(200):
        ids = tokenizer.encode(random_text(generator), add_special_tokens=False)
        text = IncrementalText(tokenizer)
        for id in ids:
            assert REPLACEMENT not in text.push([id])


def test_an_unfinished_character_becomes_a_replacement_at_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    text = IncrementalText(tokenizer)
    assert text.push(tokenizer.convert_tokens_to_ids(["a", "ð", "Ł"])) == "a"
    assert text.pending
    assert text.finish() == REPLACEMENT
    assert text.finish() == ""


def test_bytes_that_become_nothing_do_not_pile_up(tokenizer: PreTrainedTokenizerFast) -> None:
    text = IncrementalText(tokenizer)
    lone = tokenizer.convert_tokens_to_ids("ÿ")
    lengths = []
    for _ in range(300):
        text.push([lone])
        lengths.append(len(text._window))
    assert max(lengths) < 12
    text.finish()
    assert text.text == REPLACEMENT * 300


def test_end_tokens_without_number_do_not_pile_up(tokenizer: PreTrainedTokenizerFast) -> None:
    text = IncrementalText(tokenizer)
    text.push(tokenizer.encode("the cat"))
    for _ in range(100):
        assert text.push([tokenizer.eos_token_id]) == ""
    assert len(text._window) < 12
    assert text.text == "the cat"


def test_an_invalid_byte_keeps_the_valid_ones_before_it() -> None:
    """The one difference from `decode`: a byte-fallback decoder would take back what was already shown."""
    chosen = byte_fallback_tokenizer()
    ids = [*(BYTES + byte for byte in "你".encode()), BYTES + 0xFF, 4]
    text = IncrementalText(chosen)
    pieces = [text.push([id]) for id in ids]
    assert "".join(pieces) == "你" + REPLACEMENT + " a"


def test_special_ids_are_those_that_decode_skips(tokenizer: PreTrainedTokenizerFast) -> None:
    skipped = {id for id in range(len(tokenizer)) if tokenizer.decode([id], skip_special_tokens=True) == ""}
    assert special_ids(tokenizer) == skipped
    assert tokenizer.eos_token_id in skipped
