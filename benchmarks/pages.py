"""Pages of the documentation with generated parts, between two comments in Markdown."""

from __future__ import annotations

import os
import re
from argparse import ArgumentParser, Namespace
from pathlib import Path

BLOCK = re.compile(r"(<!-- report: (.+?) -->\n).*?(<!-- end of report -->)", re.DOTALL)


def fill(text: str, blocks: dict[str, str]) -> str:
    """Return a page with the content of its blocks; those without content stay as they are."""
    blocks = {name: content for name, content in blocks.items() if content}
    names = [match[2] for match in BLOCK.finditer(text)]
    if missing := blocks.keys() - names:
        name = min(missing)
        raise ValueError(f"invalid page: no block <!-- report: {name} --> for the rows of {name}")
    return BLOCK.sub(
        lambda m: f"{m[1]}\n{blocks[m[2]]}\n\n{m[3]}" if m[2] in blocks else m[0], text
    )


def fill_page(path: str | os.PathLike[str], **blocks: str) -> None:
    """Write the content of blocks into a page."""
    page = Path(path)
    page.write_text(fill(page.read_text("utf-8"), blocks), "utf-8")


def add_page_arguments(
    parser: ArgumentParser,
    results: str | os.PathLike[str],
    page: str | os.PathLike[str] | None = None,
) -> None:
    """Add ``results`` and ``page``, files with these defaults."""
    parser.add_argument("--results", default=str(results), help="JSON lines, appended to")
    default = page and str(page)
    parser.add_argument("--page", default=default, help="page to write the tables to")


def add_table_arguments(parser: ArgumentParser, results: str) -> None:
    """Add ``results``, the file with this default, ``table`` and ``page``."""
    add_page_arguments(parser, results)
    parser.add_argument("--table", action="store_true", help="print the tables without measuring")


def show(args: Namespace, name: str, text: str) -> None:
    """Print tables, and write them into the block ``name`` of ``--page``."""
    print(text)
    if args.page:
        fill_page(args.page, **{name: text})
