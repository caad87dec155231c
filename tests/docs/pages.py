"""The pages that people read, taken apart by a Markdown parser: blocks of code, headings, links, inline code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    """Of its first line of code, counted from 1."""
    language: str
    title: str
    """The file that a reader saves it as, said as `title="NAME"` behind the language; else nothing."""
    code: str

    @property
    def first(self) -> str:
        """Its first line, without what is said about it."""
        return self.code.partition("\n")[0].partition("#")[0].strip()


@dataclass(frozen=True, slots=True)
class Page:
    """A page by its path in the repository."""

    name: str
    text: str
    tokens: tuple[Token, ...]

    @property
    def blocks(self) -> tuple[Block, ...]:
        return tuple(block(self.name, token) for token in self.tokens if token.type == "fence")

    @property
    def spoken(self) -> Iterator[Token]:
        """Everything outside of blocks: text, links, inline code."""
        for token in self.tokens:
            yield from token.children or ()

    @property
    def links(self) -> tuple[str, ...]:
        """Where its links and pictures lead."""
        attributes = {"link_open": "href", "image": "src"}
        return tuple(str(token.attrs[attributes[token.type]]) for token in self.spoken if token.type in attributes)

    @property
    def inline_code(self) -> tuple[str, ...]:
        return tuple(token.content for token in self.spoken if token.type == "code_inline")

    @property
    def anchors(self) -> frozenset[str]:
        """Its headings, as links name them."""
        headings = (
            "".join(part.content for part in token.children or ())
            for before, token in zip(self.tokens, self.tokens[1:], strict=False)
            if before.type == "heading_open"
        )
        return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)


def block(page: str, fence: Token) -> Block:
    language, _, about = fence.info.strip().partition(" ")
    title = re.search(r'title="([^"]+)"', about)
    return Block(page, (fence.map or [0])[0] + 2, language, title[1] if title else "", fence.content)


@cache
def page_of(path: Path) -> Page:
    text = path.read_text(encoding="utf-8")
    parser = MarkdownIt("commonmark").enable("table")
    return Page(path.relative_to(ROOT).as_posix(), text, tuple(parser.parse(text)))


@cache
def pages() -> tuple[Page, ...]:
    """The Markdown of the root and of docs/."""
    return tuple(page_of(path) for path in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))))
