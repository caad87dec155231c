"""What a stranger sent is repeated short and printable."""

from __future__ import annotations

import pytest

from rollout_server.quoting import counted, quoted, shortened


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (5, "5"),
        (0.5, "0.5"),
        ("a b", "'a b'"),
        ("a\nb", "'a\\nb'"),
        ([1, 2], "a list"),
        ({"a": 1}, "an object"),
        (10**400, "a number of more than 64 digits"),
        (-(10**4000), "a number of more than 64 digits"),
    ],
)
def test_values_are_written_as_json_calls_them(value: object, text: str) -> None:
    assert quoted(value) == text


@pytest.mark.parametrize("text", ["x" * 10**6, "\x00" * 64, "é" * 65, "\u2028" * 40])
def test_long_text_is_cut_and_printable(text: str) -> None:
    assert len(shortened(text)) <= 64 and shortened(text).isprintable()
    assert shortened(text).endswith("…")


def test_counts_agree_with_their_noun() -> None:
    assert [counted(number, "token") for number in (0, 1, 2)] == ["0 tokens", "1 token", "2 tokens"]
