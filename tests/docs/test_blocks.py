"""Every block of code in the README and in docs/ does what the page says, in the order of the page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.docs.pages import Block, Page, pages
from tests.docs.reading import SMALLER, Reader

DRAWINGS = frozenset({"mermaid", "text"})
"""Languages that nobody runs: pictures, and what a command printed."""
ACROSS_HOSTS = "rollout-server serve --tensor-parallel 2 --hostfile hosts.json --backend jaccl"
NOT_RUN: Mapping[tuple[str, str], str] = {
    ("README.md", "make demo"): "minutes; tests/demo does it, and this is what `make test` runs",
    ("docs/quick-start.md", "make setup"): "it installs packages; `make newcomer` does it",
    ("docs/guide/operations.md", "rollout-server doctor"): "tests/machine/test_doctor.py does, for seconds",
    ("docs/guide/fleets.md", ACROSS_HOSTS): "it starts ranks on other hosts by ssh",
}
"""(Page, first line of a block) → why it is not run here."""
SHORT = frozenset({"docs/guide/numbers.md", "docs/guide/text.md"})
"""Pages that `make test` reads, and not `make test-long` alone: the others start servers of their own or train."""


def with_code() -> list[Page]:
    return [page for page in pages() if any(block.language not in DRAWINGS for block in page.blocks)]


def is_run(block: Block) -> bool:
    return block.language not in DRAWINGS and (block.page, block.first) not in NOT_RUN


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=page.name, marks=[pytest.mark.long] * (page.name not in SHORT)) for page in with_code()],
)
def test_a_page_does_what_it_says(page: Page, folder: Path, url: str) -> None:
    with Reader(folder, url) as reader:
        for block in filter(is_run, page.blocks):
            reader.follow(block)


def test_what_is_not_run_is_little_and_there() -> None:
    blocks = [block for page in with_code() for block in page.blocks if block.language not in DRAWINGS]
    there = {(block.page, block.first) for block in blocks}
    assert not NOT_RUN.keys() - there, "these blocks are gone"
    assert all(len(why.split()) > 2 for why in NOT_RUN.values())
    assert len(NOT_RUN) <= len(blocks) / 5


def test_what_is_made_smaller_is_there() -> None:
    code = "".join(block.code for page in with_code() for block in page.blocks)
    assert not [written for written in SMALLER if written not in code]
