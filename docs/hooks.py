"""Hooks of the documentation site."""

import re

ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):<code>~?([\w.]+)</code>")


def on_page_content(html: str, **kwargs) -> str:
    """Show Sphinx roles of docstrings (:class:`~a.b.C`) as code (C)."""
    return ROLE.sub(lambda match: f"<code>{match[1].rpartition('.')[2]}</code>", html)
