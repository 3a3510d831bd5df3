"""The map from the paper to the package names tests that are there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "paper_map.md").read_text()


def test_every_part_names_a_test_or_says_that_it_is_missing():
    rows = [line for line in PAGE.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 20
    for row in rows:
        _, _, here, tests, _ = (cell.strip() for cell in row.split("|"))
        names = re.findall(r"`(tests/[\w/]+\.py)`", tests)
        assert bool(names) != (here == "not built yet"), row
        for name in names:
            assert (ROOT / name).is_file(), name
