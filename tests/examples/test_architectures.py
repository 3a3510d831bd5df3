"""The page of architectures is what its script makes of the zoo."""

from pathlib import Path

import architectures as benchmark

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "architectures.md"


def test_page_is_up_to_date(tmp_path):
    benchmark.main(["--output", str(tmp_path / "page.md")])
    made = (tmp_path / "page.md").read_text(encoding="utf-8").splitlines()
    # Line by line: the first that differs names the architecture.
    assert made == PAGE.read_text(encoding="utf-8").splitlines(), (
        "run python benchmarks/architectures.py"
    )
