"""Every row of the paper map names source files and tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reference" / "paper_map.md"


def test_paper_map_names_existing_sources_and_tests():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("|")][2:]
    assert len(rows) > 20
    for row in rows:
        _, _, _, source, tests, _ = row.split("|")
        sources, tests = (re.findall(r"`([\w/]+\.py)`", cell) for cell in (source, tests))
        assert sources and tests, row
        for path in [*(f"hf_quantnoise/{name}" for name in sources), *tests]:
            assert (ROOT / path).is_file(), path
