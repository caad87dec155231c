"""What pages link to and name is there: pages and headings, files, tests, commands and options, targets of make."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

import click
import pytest
import typer

from rollout_server.cli import app
from tests.docs.pages import ROOT, Page, page_of, pages

EVERY = [pytest.param(page, id=page.name) for page in pages()]
HISTORY = "CHANGELOG.md"
"""It names what there was."""
OURS = re.compile(r"(?:[A-Z_]+=\S+ )*(?:--|rollout-server |serve |make |python )")
"""How code begins whose options are of our programs."""
OF_OTHERS = frozenset({"--resources"})
"""Options of other programs that stand alone: Ray's."""
PARTS_OF_A_TURN = frozenset({"room"})
"""What stands behind `make` and is no target of it."""


@pytest.mark.parametrize("page", EVERY)
def test_links_lead_somewhere(page: Page) -> None:
    """Those within the repository to a file, and to a heading of it; those to elsewhere are whole."""
    for link in page.links:
        if re.match(r"[a-z]+:", link):
            assert re.fullmatch(r"https?://[\w.:-]+(/\S*)?", link), link
            continue
        path, _, heading = link.partition("#")
        target = ((ROOT / page.name).parent / path).resolve() if path else ROOT / page.name
        assert target.is_relative_to(ROOT) and target.exists(), f"{link}: there is no such file"
        assert not heading or heading in page_of(target).anchors, f"{link}: there is no such heading"


@pytest.mark.parametrize("page", EVERY)
def test_files_and_tests_that_are_named_are_there(page: Page) -> None:
    if page.name == HISTORY:
        pytest.skip("it names what there was")
    for code in page.inline_code:
        if re.fullmatch(r"test_\w+", code):
            assert any(f"def {code}(" in text for text in texts_of_tests()), code
        elif re.fullmatch(r"(rollout_server|adapters|trainer_client|benchmarks|examples|tests|docs)/[\w/.-]+", code):
            assert (ROOT / code).exists(), code


@pytest.mark.parametrize("page", EVERY)
def test_commands_and_options_that_are_named_exist(page: Page) -> None:
    if page.name == HISTORY:
        pytest.skip("it names what there was")
    known = commands()
    options = {option for names in known.values() for option in names}
    code = [*page.inline_code, *(block.code for block in page.blocks if block.language == "sh")]
    for text in code:
        for name, group in re.findall(r"(?:^|[\n`])rollout-server ([a-z]+)(?: ([a-z]+))?", text):
            assert name in known or f"{name} {group}" in known, f"rollout-server {name}"
        for target in re.findall(r"(?:^|\n)make ([a-z][a-z-]+)", text):
            assert target in PARTS_OF_A_TURN or re.search(rf"^{target}:", makefile(), flags=re.MULTILINE), (
                f"make {target}"
            )
        if not OURS.match(text):
            continue
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text):
            assert option in options | OF_OTHERS or spoken_of(option), option


@cache
def commands() -> dict[str, frozenset[str]]:
    """`serve`, `weights list` and so on, with their options."""
    return dict(_commands(typer.main.get_command(app), ""))


def _commands(command: click.Command, name: str) -> Iterator[tuple[str, frozenset[str]]]:
    yield (
        name,
        frozenset(option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)),
    )
    for own, inner in getattr(command, "commands", {}).items():
        yield from _commands(inner, f"{name} {own}".strip())


@cache
def makefile() -> str:
    return (ROOT / "Makefile").read_text(encoding="utf-8")


@cache
def texts_of_tests() -> tuple[str, ...]:
    return tuple(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))


@cache
def sources() -> str:
    """Programs beside the command line: benchmarks, examples, converters, and what make calls."""
    folders = ("benchmarks", "examples", "rollout_server", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return makefile() + "".join(path.read_text(encoding="utf-8") for path in files)


def spoken_of(option: str) -> bool:
    """Whether a program of ours that is no command of `rollout-server` has the option."""
    return f'"{option}"' in sources() or f" {option} " in makefile()


def test_every_page_of_the_guide_is_in_its_list_and_in_the_site() -> None:
    own = {page.name for page in pages() if page.name.startswith("docs/guide/")}
    tree = (ROOT / "docs" / "zensical.toml").read_text(encoding="utf-8")
    assert own == set(re.findall(r'"(docs/guide/[\w-]+\.md)"', tree))
    listed = page_of(ROOT / "docs" / "guide" / "README.md").links
    assert {name.removeprefix("docs/guide/") for name in own} - {"README.md"} <= set(listed)
