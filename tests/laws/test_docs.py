"""Pages that describe tables of the code say what these say."""

from __future__ import annotations

import re
from pathlib import Path

from rollout_server.http.problems import TABLE

ROOT = Path(__file__).parents[2]
TROUBLES = ROOT / "docs" / "troubleshooting.md"


def paragraphs() -> dict[str, str]:
    """What is said of every code."""
    parts = re.split(r"^### `(\w+)`$", TROUBLES.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {
        code: re.split(r"^## ", text, flags=re.MULTILINE)[0].strip()
        for code, text in zip(*[iter(parts)] * 2, strict=True)
    }


def test_every_code_has_its_paragraph() -> None:
    assert paragraphs().keys() == {error.code for error in TABLE}
    assert all(len(text) > 60 and text.endswith(".") for text in paragraphs().values())


def test_it_says_which_errors_may_be_tried_again() -> None:
    said = {code for code, text in paragraphs().items() if "*Try again*" in text}
    assert said == {error.code for error in TABLE if error.retryable}


def test_options_that_are_named_exist() -> None:
    from rollout_server.config import ServerConfig

    named = {name.replace("-", "_") for text in paragraphs().values() for name in re.findall(r"--([a-z-]+)", text)}
    assert named <= ServerConfig.model_fields.keys()
