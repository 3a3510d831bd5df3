#!/usr/bin/env python
"""Report phrases that the project's style does not use, in code texts and in pages.

Checked are comments, docstrings and string literals of Python files, and the prose of Markdown
files (not their code). Identifiers are not checked.

    python .ci/check_language.py              # every file that git tracks
    python .ci/check_language.py hf_quantnoise/noise docs
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

# Pattern -> what to write instead.
BANNED = {
    r"\b(go|goes|going|went|gone) on\b": "resume, continue",
    r"\banew\b": "again, from scratch, re-create",
    r"\btorn\b": "incomplete, truncated, corrupted",
    r"\bwhole\b(?! numbers?\b)": "complete, full, entire",
    r"(?<!there )\b(is|are) no\b(?! longer\b)": "not a ..., must be ..., invalid ...",
    r"\b(tell|tells|telling|told)\b": "report, warn, raise, log, mention",
    r"\b(say|says|saying|said)\b": "report, warn, raise, log, mention, is stated in",
    r"\b(stand|stands|standing|stood)\b": "is, is stored, is defined in",
    r"\b(lie|lies|lying|lay|lain)\b": "is, is stored",
    r"\bwithout a word\b": "silently",
    r"\bfor ever\b": "always, permanently",
    r"\b(learns?|learnt|learned|learning) of\b": "distilled from",
    r"\blearnt\b": "learned, distilled",
    r"\bcodewords?\b": "centroid (a row of a codebook); code (its index)",
    r"\ballot(s|ted|ting|ment|ments)?\b": "allocate, bit allocation",
    r"\bstaged pass\b": "compression run",
    r"\b(a|the|this|that|each|one|earlier|finished|killed|resumed|same) pass\b": "compression run",
    r"\b(take|takes|taken|took|taking) (it |them |one of them )?out\b": "remove",
    r"\b(leave|leaves|left|leaving) (it |them )?out\b": "omit, skip; set it to ...",
    r"\bleft (dense|clean|alone)\b": "skipped, kept dense",
    r"\bof (its|their|his|one's) own\b": "own, separate",
    r"(?<!random )(?<!line )(?<!whole )(?<!version )(?<!page )(?<!step )\bnumbers\b": (
        "values, elements, parameters; the number of"
    ),
    r"\bwould do\b": "expected ...",
    r"\b(heed|heeds|heeded)\b": "uses, reads, respects",
    r"\byet to come\b": "later, remaining",
    r"\bvouch(es|ed)?\b": "shows, confirms",
    r"\b(mend|mends|mended)\b": "fix, repair",
    r"\b(spoil|spoils|spoilt)\b": "damage, degrade",
    r"\bhand(s|ed)? on\b": "passes on, forwards",
    r"\bshar(e|es|ed) out\b": "distributed, divided among",
}
PATTERNS = {re.compile(pattern, re.IGNORECASE): instead for pattern, instead in BANNED.items()}
# A docstring or a heading names the thing; it does not begin with a question word.
TITLE = re.compile(r"\s*(#+ +)?What\b(?!.*\?\s*$)")

Finding = tuple[int, str, str]


def findings_in(text: str, first_line: int = 1) -> Iterator[Finding]:
    """Yield (line, phrase, what to write instead) for each banned phrase of a text."""
    for pattern, instead in PATTERNS.items():
        for match in pattern.finditer(text):
            line = first_line + text.count("\n", 0, match.start())
            yield line, " ".join(match[0].split()), instead


def python_findings(source: str) -> Iterator[Finding]:
    """Yield the findings of a Python file: comments, docstrings and other strings."""
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", None)}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in kinds:
            yield from findings_in(token.string, token.start[0])
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        text = ast.get_docstring(node, clean=False) if isinstance(node, holders) else None
        if text and TITLE.match(text.split("\n")[0]):
            yield node.body[0].lineno, text.split("\n")[0][:40], "name the thing, or 'Return ...'"


def markdown_findings(source: str) -> Iterator[Finding]:
    """Yield the findings of a Markdown file, outside of its code."""
    blank = lambda match: "\n" * match[0].count("\n")  # noqa: E731  keeps the line numbers
    prose = re.sub(r"^(```|~~~).*?^\1", blank, source, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"`[^`\n]+`", "``", prose)
    yield from findings_in(prose)
    for number, line in enumerate(prose.split("\n"), 1):
        if line.startswith("#") and TITLE.match(line):
            yield number, line[:40], "a heading that names the topic"


def tracked_files(paths: list[str]) -> list[Path]:
    """Return the Python and Markdown files that git tracks under some paths."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "--", *paths]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")
    files = [Path(name) for name in names if name.endswith((".py", ".md"))]
    return [file for file in files if file.is_file() and file.resolve() != Path(__file__).resolve()]


def main() -> int:
    """Print one line per finding and return the exit code."""
    count = 0
    for file in tracked_files(sys.argv[1:]):
        read = python_findings if file.suffix == ".py" else markdown_findings
        for line, phrase, instead in sorted(set(read(file.read_text(encoding="utf-8")))):
            count += 1
            print(f"{file}:{line}: {phrase!r}; write: {instead}")
    if count:
        print(f"{count} phrases that the style guide replaces", file=sys.stderr)
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
