"""Figures come from commands that their reader can run again."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import ROOT, page_of

COMMAND = re.compile(
    r"(\.venv[\w-]*/bin/)?(python|python3) (-m [\w.]+|examples/[\w/]+\.py)"
    r"|make [a-z-]+|rollout-server [a-z]+|pytest |examples/[\w/]+\.py|tests/[\w/{},]+(\.py)?$|test_\w+$"
)
SECTIONS = re.split(r"(?m)^## ", (ROOT / "docs" / "figures.md").read_text(encoding="utf-8"))[1:]
FIGURE = re.compile(r"\d\.\d|\d %|\d (ms|s|µs|MB|GB|tok/s)\b")


def test_the_page_has_sections() -> None:
    assert len(SECTIONS) > 10
    assert page_of(ROOT / "docs" / "figures.md").text.count("\n## ") == len(SECTIONS)


@pytest.mark.parametrize("section", SECTIONS, ids=[section.partition("\n")[0] for section in SECTIONS])
def test_a_section_with_figures_names_what_prints_them(section: str) -> None:
    named = [code for code in re.findall(r"`([^`]+)`", section.replace("\n", " ")) if COMMAND.match(code)]
    assert named or not FIGURE.search(section)


@pytest.mark.parametrize("section", SECTIONS, ids=[section.partition("\n")[0] for section in SECTIONS])
def test_no_figure_is_from_nowhere(section: str) -> None:
    for said in ("no command", "measured while", "script outside"):
        assert said not in " ".join(section.split()), said
