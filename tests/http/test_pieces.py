"""Parts of a completion that are functions of their own: strings of tokens, processed alternatives, held-back text."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from rollout_server.detokenize import IncrementalText
from rollout_server.engine.messages.scoring import ScoredSequence
from rollout_server.http.choices import ChoiceOptions, Echo
from rollout_server.http.processed import processed_top
from rollout_server.http.prompts import PromptTokens
from rollout_server.http.row_text import RowText
from rollout_server.http.token_strings import TokenStrings
from rollout_server.rollout import SamplingParams
from rollout_server.token_texts import byte_level_alphabet
from tests.tiny_tokenizers import BYTES, KINDS, spaces

# ---- strings of single tokens -------------------------------------------------------------------------------------


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


# ---- tokens of an echoed prompt -----------------------------------------------------------------------------------


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


# ---- alternatives under the sampling distribution -----------------------------------------------------------------


def filtered(logits: np.ndarray, sampling: SamplingParams) -> np.ndarray:
    """log-probabilities after temperature, top-k, top-p, min-p, each renormalised; -inf where removed."""
    values = logits / sampling.temperature
    values = values - np.log(np.exp(values).sum())

    def keep(mask: np.ndarray) -> np.ndarray:
        kept = np.where(mask, values, -np.inf)
        return np.asarray(kept - np.log(np.exp(kept).sum()))

    order = np.argsort(-values)
    rank = np.argsort(order)
    if sampling.top_k:
        values = keep(rank < sampling.top_k)
    if sampling.top_p < 1:
        before = np.concatenate([[0], np.cumsum(np.exp(values[order]))[:-1]])
        values = keep(before[rank] < sampling.top_p)
    if sampling.min_p:
        values = keep(values >= values.max() + np.log(sampling.min_p))
    return values


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 2.0, "top_k": 4},
        {"top_p": 0.7},
        {"temperature": 1.3, "top_k": 9, "top_p": 0.8},
        {"min_p": 0.2},
        {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_processed_alternatives_are_exact(given: dict[str, Any]) -> None:
    sampling = SamplingParams(max_tokens=1, **given)
    generator = np.random.default_rng(1)
    for _ in range(40):
        logits = generator.normal(scale=2.0, size=30)
        raw = logits - np.log(np.exp(logits).sum())
        exact = filtered(raw, sampling)
        drawn = int(generator.choice(30, p=np.exp(exact)))
        for count in (1, 3, 30):
            top = [(int(id), float(raw[id])) for id in np.argsort(-raw)[:count]]
            found = processed_top(
                top, logprob=float(raw[drawn]), sampling_logprob=float(exact[drawn]), sampling=sampling
            )
            expected = [(id, exact[id]) for id, _ in top if exact[id] > -np.inf]
            assert [id for id, _ in found] == [id for id, _ in expected]
            assert np.allclose([value for _, value in found], [value for _, value in expected], atol=1e-9)


def test_a_greedy_row_has_one_alternative() -> None:
    sampling = SamplingParams(max_tokens=1, temperature=0)
    assert processed_top([(5, -0.3), (6, -1.0)], logprob=-0.3, sampling_logprob=0.0, sampling=sampling) == [(5, 0.0)]
    assert processed_top([], logprob=-0.3, sampling_logprob=0.0, sampling=sampling) == []


# ---- text that a stop string may take back ------------------------------------------------------------------------


def test_nothing_shown_is_taken_back(tokenizer: Any) -> None:
    """Random rows against the plain rule: decode after every token, stop where a string ends in the new text."""
    generator = random.Random(5)
    letters = tokenizer.encode("abc", add_special_tokens=False)
    for _ in range(400):
        stops = ["".join(generator.choice("abc") for _ in range(generator.randrange(1, 4))) for _ in range(2)]
        ids = [generator.choice(letters) for _ in range(generator.randrange(1, 25))]
        row = RowText(IncrementalText(tokenizer), stops=stops, ends=())
        shown, decoded, cut = "", "", None
        for id in ids:
            before = len(decoded)
            row.push(id)
            assert row.begins[-1] == before
            decoded += tokenizer.decode([id])
            shown += row.ready()
            ending = [place for stop in stops if (place := decoded.find(stop, max(0, before - len(stop) + 1))) >= 0]
            if ending:
                cut = min(ending)
                break
        whole = decoded if cut is None else decoded[:cut]
        assert whole.startswith(shown)
        assert shown + row.rest(whole) == whole


def test_a_stop_string_before_min_tokens_is_released(tokenizer: Any) -> None:
    row = RowText(IncrementalText(tokenizer), stops=["b"], ends=())
    shown = []
    for id in tokenizer.encode("abac"):
        row.push(id)
        shown.append(row.ready())
    # "b" was held until the next token showed that the row went on
    assert shown == ["a", "", "ba", "c"]


def test_an_end_token_is_held_until_it_was_none(tokenizer: Any) -> None:
    end = tokenizer.encode("b")[0]
    row = RowText(IncrementalText(tokenizer), stops=[], ends={end})
    shown = []
    for id in tokenizer.encode("abab"):
        row.push(id)
        shown.append(row.ready())
    assert shown == ["a", "", "ba", ""]
    assert row.rest("aba") == "" and list(row.begins) == [0, 1, 2]
