"""Strings of tokens: they add up to the text, and tell tokens apart."""

from __future__ import annotations

from typing import Any

import pytest

from rollout_server.engine.messages.scoring import ScoredSequence
from rollout_server.http.replies.choices import ChoiceOptions, Echo
from rollout_server.http.requests.tokens.prompts import PromptTokens
from rollout_server.text.detokenize import IncrementalText
from rollout_server.text.token_strings import TokenStrings
from rollout_server.text.token_texts import byte_level_alphabet
from tests.support.tiny_tokenizers import BYTES, KINDS, spaces


def test_strings_of_tokens_add_up_to_the_text(tokenizer: Any) -> None:
    strings = TokenStrings(tokenizer)
    ids = tokenizer.encode(" the cat and  the hat")
    assert "".join(strings[id] for id in ids) == " the cat and  the hat"


def test_a_part_of_a_character_is_written_as_bytes(tokenizer: Any) -> None:
    strings = TokenStrings(tokenizer)
    assert strings[tokenizer.convert_tokens_to_ids("ð")] == "bytes:\\xf0"
    written = "".join(strings[id] for id in tokenizer.encode("ξ"))
    assert written == "".join(f"bytes:\\x{byte:02x}" for byte in "ξ".encode())


def test_special_and_unknown_ids_have_names(tokenizer: Any) -> None:
    strings = TokenStrings(tokenizer)
    assert strings[tokenizer.eos_token_id] == "<|end|>"
    assert strings[10_000] == "token_id:10000"


def test_a_leading_space_is_kept_and_byte_tokens_are_bytes() -> None:
    tokenizer = spaces()
    strings = TokenStrings(tokenizer)
    assert strings[tokenizer.convert_tokens_to_ids("▁a")] == " a"
    assert strings[tokenizer.convert_tokens_to_ids("▁")] == " "
    assert strings[BYTES + 0xE4] == "bytes:\\xe4" and strings.utf8(BYTES + 0xE4) == b"\xe4"
    assert strings[BYTES + 0x0A] == "\n"
    assert strings[tokenizer.convert_tokens_to_ids("你")] == "你"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "suffixed"])
def test_the_tokens_of_a_text_join_to_it(kind: str) -> None:
    """Behind a prompt, where no decoder trims, and unless a token writes the space of the one before it."""
    tokenizer = KINDS[kind]()
    strings, checked = TokenStrings(tokenizer), 0
    for text in (" the cat", "one two", "a, b.", "hello a"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if tokenizer.unk_token_id not in ids:
            decoder = IncrementalText(tokenizer, context=ids[:1])
            assert decoder.push(ids[1:]) == "".join(strings[id] for id in ids[1:])
            checked += 1
    assert checked


def test_strings_tell_tokens_apart(tokenizer: Any) -> None:
    strings = TokenStrings(tokenizer)
    written = [strings[id] for id in range(len(tokenizer))]
    assert len(set(written)) == len(written)


def test_the_alphabet_is_the_tokenizer_s() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(byte_level_alphabet()) == set(ByteLevel.alphabet())
    assert sorted(byte_level_alphabet().values()) == list(range(256))


def echoed(kind: str, text: str) -> list[tuple[str, int]]:
    """Every token of the prompt, and where in its text it stands."""
    tokenizer = KINDS[kind]()
    ids = tokenizer.encode(text)
    strings = TokenStrings(tokenizer)
    reading = ChoiceOptions(tokenizer, strings, (), top_logprobs=0, logprobs_mode="raw_logprobs", include_stop=False)
    echo = Echo.of(PromptTokens(ids, text), ScoredSequence((0.0,) * len(ids), None, None, ()), reading)
    assert echo.piece.text == text and echo.piece.scored_ids == ids and not echo.opened
    return [(strings[id], offset) for id, offset in zip(ids, echo.piece.offsets, strict=True)]


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("byte_level", " the <mask>é", [(" the", 0), ("<mask>", 5), ("bytes:\\xc3", 11), ("bytes:\\xa9", 11)]),
        ("spaces", "x =", [("<s>", 0), (" ", 0), ("x", 0), (" ", 1), ("=", 2)]),
        ("spaces", " x", [("<s>", 0), (" ", 0), (" ", 0), ("x", 1)]),
        # The tokenizer writes a space behind each special token that the text names.
        ("spaces", "a</s>bc", [("<s>", 0), (" ", 0), ("a", 0), ("</s>", 1), (" ", 5), ("b", 5), ("c", 6)]),
        ("spaces", "</s>é", [("<s>", 0), ("</s>", 0), (" ", 4), ("bytes:\\xc3", 4), ("bytes:\\xa9", 4)]),
        # The token takes the spaces around it.
        ("metaspace", "b  <mask>  c", [(" ", 0), ("b", 0), ("<mask>", 3), (" ", 9), ("c", 11)]),
        ("metaspace", "the~the", [(" the", 0), ("~", 3), ("t", 4), ("h", 5), ("e", 6)]),
        ("word_piece", "hello, a", [(" hello", 0), (" ,", 5), (" a", 6)]),
    ],
    ids=repr,
)
def test_tokens_of_an_echoed_text_stand_where_it_has_them(kind: str, text: str, expected: Any) -> None:
    assert echoed(kind, text) == expected
