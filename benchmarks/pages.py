"""Pages of the documentation with generated parts, between two comments in Markdown."""

from __future__ import annotations

import os
import re
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
