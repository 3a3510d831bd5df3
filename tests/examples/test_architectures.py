"""The pages of architectures are what their script makes of the zoo."""

import shutil
from pathlib import Path

import architectures as benchmark

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {"--output": "reference/architectures.md", "--export_page": "how_to/export.md"}


def test_pages_are_up_to_date(tmp_path):
    made = {flag: tmp_path / Path(page).name for flag, page in PAGES.items()}
    shutil.copyfile(DOCS / PAGES["--export_page"], made["--export_page"])
    benchmark.main([word for flag, path in made.items() for word in (flag, str(path))])
    for flag, page in PAGES.items():
        # Line by line: the first that differs names the architecture.
        found, expected = (
            path.read_text(encoding="utf-8").splitlines() for path in (made[flag], DOCS / page)
        )
        assert found == expected, "run python benchmarks/architectures.py"
