"""Text from tokens, a few at a time: whole characters, and at the end what `decode` says."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rollout_server.rollout import PolicyAddress, RolloutRequest, SamplingParams
from rollout_server.text.detokenize import IncrementalText, special_ids, whole_text
from rollout_server.text.token_texts import REPLACEMENT, TokenTexts, byte_level_alphabet, texts_of
from tests.support.tiny_tokenizers import BYTES, KINDS, byte_level, spaces

WITH_BYTES = ("byte_level", "spaces", "unstripped")
FALLBACK = ("spaces", "unstripped")


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def chosen(kind: str) -> PreTrainedTokenizerFast:
    return KINDS[kind]()


def byte_ids(kind: str, tokenizer: PreTrainedTokenizerFast, raw: bytes) -> list[int]:
    """One token a byte."""
    if kind in FALLBACK:
        return [BYTES + byte for byte in raw]
    names = {byte: name for name, byte in byte_level_alphabet().items()}
    return list(tokenizer.convert_tokens_to_ids([names[byte] for byte in raw]))


def random_text(generator: random.Random) -> str:
    ranges = ((32, 127), (0x80, 0x800), (0x800, 0xD800), (0x1F300, 0x1F650))
    return "".join(chr(generator.randrange(*generator.choice(ranges))) for _ in range(generator.randrange(1, 30)))


def any_ids(kind: str, tokenizer: PreTrainedTokenizerFast, generator: random.Random, most: int = 40) -> list[int]:
    """Every token may stand behind every other."""
    ids = [generator.randrange(len(tokenizer)) for _ in range(generator.randrange(most))]
    if kind in WITH_BYTES and generator.random() < 0.7:
        for _ in range(generator.randrange(4)):
            raw = random_text(generator).encode()
            at, cut = generator.randrange(len(ids) + 1), generator.randrange(len(raw) + 1)
            ids[at:at] = byte_ids(kind, tokenizer, raw[: min(cut, 9)])
    return ids


def sound_ids(kind: str, tokenizer: PreTrainedTokenizerFast, generator: random.Random) -> list[int]:
    """Ids of which `decode` is a reference: for a byte-fallback decoder, which takes a broken byte for a reason to
    break its neighbours too, the bytes of whole characters."""
    if kind not in FALLBACK:
        return any_ids(kind, tokenizer, generator)
    others = [id for id in range(len(tokenizer)) if not BYTES <= id < BYTES + 256]
    ids: list[int] = []
    for character in random_text(generator):
        ids += byte_ids(kind, tokenizer, character.encode()) if generator.random() < 0.5 else [generator.choice(others)]
    return ids


def decoded(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def chunks(ids: Sequence[int], generator: random.Random) -> list[Sequence[int]]:
    found, at = [], 0
    while at < len(ids):
        step = generator.choice([1, 1, 1, 2, 5, 200])
        found.append(ids[at : at + step])
        at += step
    return found


# ---- what decode says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [True, False])
def test_the_pieces_add_up_to_what_decode_says(kind: str, chosen: PreTrainedTokenizerFast, skip: bool) -> None:
    generator = random.Random(f"{kind}/{skip}")
    for _ in range(200):
        ids = sound_ids(kind, chosen, generator)
        whole = chosen.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        text, pieces = IncrementalText(chosen, skip_special_tokens=skip), ""
        for chunk in chunks(ids, generator):
            pieces += text.push(chunk)
            assert whole.startswith(pieces)
            assert text.text == pieces
            assert text.length == len(pieces)
            assert text.tail(5) == pieces[-5:]
        pieces += text.finish()
        assert pieces == text.text == whole
        assert not text.pending and text.finish() == ""


def test_behind_a_prompt_it_is_what_the_whole_adds_to_it(kind: str, chosen: PreTrainedTokenizerFast) -> None:
    """The prompt may end in a word, a space, a special token, inside of a character, or be one token."""
    generator = random.Random(f"behind {kind}")
    for _ in range(300):
        ids = sound_ids(kind, chosen, generator)
        cut = generator.randrange(len(ids) + 1)
        first, row = ids[:cut], ids[cut:]
        before = IncrementalText(chosen, skip_special_tokens=False)
        before.push(first)
        text = IncrementalText(chosen, skip_special_tokens=False, context=first)
        text.push(row)
        text.finish()
        assert before.text + text.text == decoded(chosen, ids)
        assert len(before.starts) + text.opened == len(first)
        assert len(text.starts) == text.opened + len(row)


def test_only_the_start_of_a_text_is_trimmed() -> None:
    tokenizer = spaces()
    ids = tokenizer.encode("x = 1", add_special_tokens=False)
    row = [tokenizer.convert_tokens_to_ids(token) for token in ("▁", "#", "▁a")]
    for context, expected in (
        (ids, " # a"),
        ([tokenizer.bos_token_id], " # a"),
        (tokenizer.convert_tokens_to_ids(["▁"]), " # a"),
        ([], "# a"),
    ):
        text = IncrementalText(tokenizer, context=context)
        assert text.push(row) == expected
    # A special token that is not shown leaves no mark, and the first word is still the first.
    assert IncrementalText(tokenizer).push([tokenizer.eos_token_id, *row]) == "# a"


# ---- the same however it comes ------------------------------------------------------------------------------------


def test_text_and_places_are_the_same_however_the_ids_come(kind: str, chosen: PreTrainedTokenizerFast) -> None:
    generator = random.Random(f"any {kind}")
    for _ in range(200):
        ids, context = any_ids(kind, chosen, generator), any_ids(kind, chosen, generator, most=4)
        found = []
        for dealt in ([ids], [[id] for id in ids], chunks(ids, generator)):
            text = IncrementalText(chosen, context=context)
            shown = "".join([text.push(chunk) for chunk in dealt])
            shown += text.finish()
            assert shown == text.text
            assert len(text.starts) == text.opened + len(ids)
            assert text.starts == sorted(text.starts) and (not text.starts or text.starts[-1] <= len(shown))
            found.append((shown, text.starts))
        assert found[0] == found[1] == found[2]


def test_a_token_stands_where_its_place_says(kind: str, chosen: PreTrainedTokenizerFast) -> None:
    """Whole ones have their text there; parts of characters share a character, or are a U+FFFD."""
    generator, texts = random.Random(f"place {kind}"), TokenTexts(chosen)
    for _ in range(200):
        ids = any_ids(kind, chosen, generator)
        text = IncrementalText(chosen, skip_special_tokens=False)
        text.push(ids)
        text.finish()
        for before, id, start, end in zip(
            [None, *ids], ids, text.starts, [*text.starts[1:], text.length], strict=False
        ):
            own = texts.of(before, id)
            if isinstance(own, str):
                assert text.text[start:end] == own
            else:
                assert own.decode(errors="ignore") in text.text[start : end + 1]


@pytest.mark.parametrize(
    ("raw", "spread", "each"),
    [
        # A lone byte, then a word: the word begins behind the U+FFFD.
        ([b"\xe4", b" x"], (REPLACEMENT + " x", [0, 1]), None),
        ([b"\xe4", b"\xe4", b" x"], (2 * REPLACEMENT + " x", [0, 1, 2]), None),
        ([b"\xff", b"a", b"\xff"], (f"{REPLACEMENT}a{REPLACEMENT}", [0, 1, 2]), None),
        ([b"\xe4", b"\xbd", b"\xa0", b"a"], ("你a", [0, 0, 0, 1]), None),
        ([b"\xe4", b"\xe4", b"\xbd", b"\xa0", b"a"], (REPLACEMENT + "你a", [0, 1, 1, 1, 2]), None),
        # Two bytes of a character: one U+FFFD, or one each where each byte is a token that stands for itself.
        ([b"\xe4", b"\xbd", b"a"], (REPLACEMENT + "a", [0, 0, 1]), (2 * REPLACEMENT + "a", [0, 1, 2])),
        ([b"a", b"\xf0", b"\x9f", b"\x98"], ("a" + REPLACEMENT, [0, 1, 1, 1]), ("a" + 3 * REPLACEMENT, [0, 1, 2, 3])),
    ],
    ids=repr,
)
@pytest.mark.parametrize("kind", WITH_BYTES)
@pytest.mark.parametrize("prompt", [0, 1, 2, 3])
def test_places_of_incomplete_characters(
    kind: str, prompt: int, raw: list[bytes], spread: tuple[str, list[int]], each: tuple[str, list[int]] | None
) -> None:
    """However many of the bytes are the prompt's."""
    tokenizer = KINDS[kind]()
    expected, places = each if each is not None and kind in FALLBACK else spread
    ids = [id for part in raw for id in byte_ids(kind, tokenizer, part)]
    # " x" is two tokens here.
    places = [place + at for place, part in zip(places, raw, strict=True) for at in range(max(1, len(part)))]
    before = IncrementalText(tokenizer, context=tokenizer.encode("a"))
    before.push(ids[:prompt])
    text = IncrementalText(tokenizer, context=[*tokenizer.encode("a"), *ids[:prompt]])
    text.push(ids[prompt:])
    text.finish()
    assert before.text + text.text == expected
    assert before.starts + [before.length + start for start in text.starts] == places


# ---- characters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WITH_BYTES)
def test_a_character_waits_for_its_last_byte(kind: str) -> None:
    tokenizer = KINDS[kind]()
    text = IncrementalText(tokenizer)
    ids = byte_ids(kind, tokenizer, "a😀b".encode())
    assert [text.push([id]) for id in ids] == ["a", "", "", "", "😀", "b"]


@pytest.mark.parametrize("kind", WITH_BYTES)
def test_every_prefix_shows_whole_characters_only(kind: str) -> None:
    tokenizer, generator = KINDS[kind](), random.Random(3)
    for _ in range(200):
        text = IncrementalText(tokenizer)
        for id in byte_ids(kind, tokenizer, random_text(generator).encode()):
            assert REPLACEMENT not in text.push([id])


def test_an_unfinished_character_becomes_a_replacement_at_the_end() -> None:
    text = IncrementalText(byte_level())
    assert text.push(byte_ids("byte_level", byte_level(), b"a\xf0\x9f")) == "a"
    assert text.pending
    assert text.finish() == REPLACEMENT
    assert text.finish() == ""


def test_what_can_be_no_character_is_out_at_once() -> None:
    for kind in WITH_BYTES:
        tokenizer = KINDS[kind]()
        text = IncrementalText(tokenizer)
        assert [text.push([id]) for id in byte_ids(kind, tokenizer, b"\xff" * 300)] == [REPLACEMENT] * 300


def test_a_token_that_is_a_replacement_is_no_incomplete_character() -> None:
    tokenizer = spaces()
    assert IncrementalText(tokenizer).push(tokenizer.convert_tokens_to_ids([REPLACEMENT])) == REPLACEMENT


@pytest.mark.parametrize("kind", FALLBACK)
def test_an_invalid_byte_keeps_the_valid_ones_around_it(kind: str) -> None:
    """The one difference from `decode`: a byte-fallback decoder would take back what was already shown."""
    tokenizer = KINDS[kind]()
    ids = [*byte_ids(kind, tokenizer, b"\x08" + "你".encode() + b"\xffA"), tokenizer.convert_tokens_to_ids("▁a")]
    text = IncrementalText(tokenizer)
    assert "".join(text.push([id]) for id in ids) == f"\x08你{REPLACEMENT}A a"


def test_special_ids_are_those_that_decode_skips(kind: str, chosen: PreTrainedTokenizerFast) -> None:
    texts = {id: chosen.decode([id]) for id in range(len(chosen))}
    skipped = {id for id, text in texts.items() if text and chosen.decode([id], skip_special_tokens=True) == ""}
    assert special_ids(chosen) == skipped


# ---- cost ---------------------------------------------------------------------------------------------------------


class Counting:
    """A tokenizer that counts the ids it is made to decode."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.fed = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def decode(self, ids: list[int], **options: Any) -> Any:
        self.fed += len(ids)
        return self._tokenizer.decode(ids, **options)


def test_a_token_is_decoded_once_however_often_it_comes(kind: str, chosen: PreTrainedTokenizerFast) -> None:
    counting, generator = Counting(chosen), random.Random(kind)
    ids = [generator.randrange(len(chosen)) for _ in range(5000)]
    # Decoders that look at the token before are asked for each pair.
    most = 6 * (len(set(ids)) if kind != "suffixed" else len(set(ids)) ** 2)
    for _ in range(3):
        text = IncrementalText(counting, context=ids)  # type: ignore[arg-type]
        text.push(ids)
        assert counting.fed <= most + 2 * len(chosen) < 5000


def test_all_at_once_is_what_the_pieces_come_to(kind: str, chosen: PreTrainedTokenizerFast) -> None:
    """At the start of a text and behind a prompt that ends anywhere, with special tokens that are shown or not."""
    generator, at_once = random.Random(f"whole {kind}"), 0
    asked: dict[str, Any] = {"id": "r", "policy": PolicyAddress("base"), "seeds": (0,)}
    asked |= {"sampling": SamplingParams(max_tokens=2)}
    special = sorted(special_ids(chosen))
    for _ in range(120):
        prompt, ids = any_ids(kind, chosen, generator) or [0], any_ids(kind, chosen, generator)
        shown = frozenset(special[:1]) if generator.random() < 0.3 else frozenset()
        continues = generator.random() < 0.5
        request = RolloutRequest(**asked, prompt_ids=tuple(prompt), shown=shown, continues=continues)
        text = IncrementalText.of(chosen, request)
        text.push(ids)
        text.finish()
        assert whole_text(chosen, request, ids) == text.text
        at_once += texts_of(chosen).at_once(ids, behind=continues) is not None
    assert (at_once > 0) == (kind != "suffixed")


# ---- rows ---------------------------------------------------------------------------------------------------------


def test_a_row_is_read_behind_its_prompt_unless_it_is_a_turn() -> None:
    tokenizer = spaces()
    prompt, mask = tuple(tokenizer.encode("x")), tokenizer.convert_tokens_to_ids("<mask>")
    row = [tokenizer.convert_tokens_to_ids("▁the"), mask]
    asked: dict[str, Any] = {"id": "r", "prompt_ids": prompt, "policy": PolicyAddress("base"), "seeds": (0,)}
    asked |= {"sampling": SamplingParams(max_tokens=2)}
    assert IncrementalText.of(tokenizer, RolloutRequest(**asked)).push(row) == " the"
    assert IncrementalText.of(tokenizer, RolloutRequest(**asked, continues=False)).push(row) == "the"
    assert IncrementalText.of(tokenizer, RolloutRequest(**asked, shown=frozenset([mask]))).push(row) == " the<mask>"
