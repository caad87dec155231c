"""`python -m tests.docs.build_site`: the site of README and docs/, in site/html; `make docs` installs what it needs.

The pages are written to be read in the repository, and stay so. Here they are copied to site/source as they lie:
sources that pages link to become pages too, diagrams become pictures, and then zensical builds strictly, where a
warning fails. So does whatever a browser would fetch from another host.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.docs.pages import ROOT, pages

SITE = ROOT / "site"
SOURCE = SITE / "source"
FENCE = "`" * 6
"""Longer than any in a file that is shown."""
LANGUAGES = {".py": "python", ".toml": "toml", ".yaml": "yaml", ".json": "json", ".sh": "sh"}


def main() -> None:
    shutil.rmtree(SITE, ignore_errors=True)
    SOURCE.mkdir(parents=True)
    for page in pages():
        write(page.name, with_pictures(page.name, with_pages_of_sources(page.name, page.text)))
    for asset in (ROOT / "docs").rglob("*"):
        if asset.suffix in (".png", ".svg", ".json", ".js"):
            copy = SOURCE / asset.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(asset, copy)
    shutil.copyfile(ROOT / "docs" / "zensical.toml", SITE / "zensical.toml")
    if subprocess.run([sys.executable, "-m", "zensical", "build", "--clean", "--strict"], cwd=SITE).returncode:
        sys.exit("The site was not built.")
    if found := sorted(fetched_from_elsewhere()):
        sys.exit(f"A browser would fetch these from another host: {', '.join(found)}.")


def fetched_from_elsewhere() -> set[str]:
    """Scripts, styles, fonts and pictures of other hosts that the site's pages and styles name."""
    wanted = re.compile(
        r"""(?:src|@import\s+(?:url\()?)\s*=?\s*["']?(https?://[^"'\s>)]+)"""
        r"""|<link[^>]+href="(https?://[^"]+)"|url\(\s*["']?(https?://[^"'\s)]+)"""
    )
    files = (file for kind in ("*.html", "*.css") for file in SITE.joinpath("html").rglob(kind))
    texts = (file.read_text(encoding="utf-8") for file in files)
    return {"".join(found) for text in texts for found in wanted.findall(text)}


def write(name: str, text: str) -> None:
    path = SOURCE / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def with_pages_of_sources(name: str, text: str) -> str:
    """The text with links to sources leading to pages that show them; these are written on the way."""

    def shown(link: re.Match[str]) -> str:
        path, mark, heading = link[1].partition("#")
        target = (ROOT / name).parent.joinpath(path).resolve() if path and "://" not in path else None
        if target is None or not target.is_file() or target.suffix in (".md", ".png", ".svg"):
            return link[0]
        if target.is_relative_to(ROOT / "docs") and target.suffix == ".json":
            return link[0]
        place = target.relative_to(ROOT).as_posix()
        language = LANGUAGES.get(target.suffix, "")
        write(f"{place}.md", f"# `{place}`\n\n{FENCE}{language}\n{target.read_text(encoding='utf-8')}{FENCE}\n")
        return f"]({path}.md{mark}{heading})"

    return re.sub(r"\]\(([^)\s]+)\)", shown, text)


def with_pictures(name: str, text: str) -> str:
    """The text with pictures in the place of Mermaid's diagrams, which a browser would fetch a program for."""
    import mermaidx

    drawn = 0

    def draw(fence: re.Match[str]) -> str:
        nonlocal drawn
        drawn += 1
        picture = f"{Path(name).stem}-{drawn}.svg"
        write((Path(name).parent / picture).as_posix(), mermaidx.render(fence[1]).svg())
        return f"![A diagram]({picture})"

    return re.sub(r"^```mermaid\n(.*?)^```$", draw, text, flags=re.DOTALL | re.MULTILINE)


if __name__ == "__main__":
    main()
