"""Text that is held back: nothing that was shown is taken back."""

from __future__ import annotations

import random
from typing import Any

from rollout_server.text.detokenize import IncrementalText
from rollout_server.text.stop_strings import RowText


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
