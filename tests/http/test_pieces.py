"""Parts of a completion that are functions of their own: strings of tokens, processed alternatives, held-back text."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from rollout_server.http.processed import processed_top
from rollout_server.http.row_text import RowText
from rollout_server.http.token_strings import TokenStrings, byte_level_alphabet
from rollout_server.rollout import SamplingParams
from tests.http.test_detokenize import BYTES, byte_fallback_tokenizer

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
    strings = TokenStrings(byte_fallback_tokenizer())
    assert strings[4] == " a"
    assert strings[BYTES + 0xE4] == "bytes:\\xe4"
    assert strings[BYTES + 0x0A] == "\n"
    assert strings[6] == "你"


def test_strings_tell_tokens_apart(tokenizer: Any) -> None:
    strings = TokenStrings(tokenizer)
    written = [strings[id] for id in range(len(tokenizer))]
    assert len(set(written)) == len(written)


def test_the_alphabet_is_the_tokenizer_s() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(byte_level_alphabet()) == set(ByteLevel.alphabet())
    assert sorted(byte_level_alphabet().values()) == list(range(256))


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
        row = RowText(tokenizer, stops=stops, ends=())
        shown, decoded, cut = "", "", None
        for id in ids:
            before = len(decoded)
            assert row.push(id) == before
            decoded += tokenizer.decode([id])
            shown += row.ready()
            ending = [place for stop in stops if (place := decoded.find(stop, max(0, before - len(stop) + 1))) >= 0]
            if ending:
                cut = min(ending)
                break
        whole = decoded if cut is None else decoded[:cut]
        assert whole.startswith(shown)
        assert shown + row.finish(whole) == whole


def test_a_stop_string_before_min_tokens_is_released(tokenizer: Any) -> None:
    row = RowText(tokenizer, stops=["b"], ends=())
    shown = []
    for id in tokenizer.encode("abac"):
        row.push(id)
        shown.append(row.ready())
    # "b" was held until the next token showed that the row went on
    assert shown == ["a", "", "ba", "c"]


def test_an_end_token_is_held_until_it_was_none(tokenizer: Any) -> None:
    end = tokenizer.encode("b")[0]
    row = RowText(tokenizer, stops=[], ends={end})
    shown = []
    for id in tokenizer.encode("abab"):
        row.push(id)
        shown.append(row.ready())
    assert shown == ["a", "", "ba", ""]
    assert row.finish("aba") == ""
