"""Tables in notebooks: HTML, and pandas data frames."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from .text import printable

if TYPE_CHECKING:
    from pandas import DataFrame


def html_table(lines: Iterable[Sequence[object]], left: int = 2, below: str = "") -> str:
    """Return an HTML table; the first line is its head.

    Args:
        lines: cells of each line.
        left: number of columns that are aligned left.
        below: text below the table.
    """

    def row(cells: Sequence[object], tag: str) -> str:
        return "".join(
            f'<{tag} style="text-align: {"left" if i < left else "right"}">'
            f"{escape(printable(str(cell)))}</{tag}>"
            for i, cell in enumerate(cells)
        )

    head, *rows = lines
    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in rows)
    table = f"<table><thead><tr>{row(head, 'th')}</tr></thead><tbody>{body}</tbody></table>"
    return table + (f"<pre>{escape(below)}</pre>" if below else "")


def data_frame(rows: Iterable[dict[str, Any]]) -> DataFrame:
    """Return a data frame with a row for each dict.

    Raises:
        ImportError: if pandas is not installed.
    """
    try:
        from pandas import DataFrame
    except ImportError:
        raise ImportError(
            "to_pandas requires pandas; run pip install 'hf-quantnoise[pandas]'"
        ) from None
    return DataFrame(list(rows))
