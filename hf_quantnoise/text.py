"""Text and values that come from files, made safe to show in a terminal, a log or Markdown.

Names, reasons and groups of a checkpoint are data of a stranger. Control characters in them could
clear a terminal; HTML, or marks that reverse the direction of text, could hide a part of it.
"""

from __future__ import annotations

import re

MAX_SHOWN = 200  # characters of a value in an error

# Characters of Markdown and HTML that change how the text around them is shown.
_MARKDOWN = re.compile(r"[\\`*\[\]<>|~]")


def printable(text: object) -> str:
    """Return a text on one line, with each character that cannot be printed as its escape code.

    These are control and format characters (newlines, ANSI escapes, right-to-left marks) and all
    spaces but the usual one, as in ``repr``.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shown(value: object) -> str:
    """Return the ``repr`` of a value for an error, shortened if it is long."""
    try:
        text = repr(value)
    except RecursionError:
        return f"a {type(value).__name__} that is nested too deeply"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def markdown(text: object) -> str:
    """Return a text for Markdown, which shows it as it is."""
    return _MARKDOWN.sub(r"\\\g<0>", printable(text))


def markdown_code(text: object) -> str:
    """Return a text as inline code for Markdown; ``|`` is escaped by the tables."""
    text = printable(text)
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    space = " " if longest else ""
    return f"{fence}{space}{text}{space}{fence}"
