"""The benchmark of starting up: cases in turn, and a table of ratios in a page."""

import pytest
import startup


def test_startup_cases_run_in_turn_and_fill_the_page(tmp_path, monkeypatch, capsys):
    order = []

    def spend(arguments, folder):
        order.append(arguments)
        return 4.0 if arguments == startup.CASES[startup.TRAINER][0] else 1.0

    monkeypatch.setattr(startup, "cpu_seconds", spend)
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n<!-- report: startup -->\n<!-- end of report -->\n")
    flags = ["--results", str(tmp_path / "rows.jsonl"), "--page", str(page)]
    startup.main([*flags, "--repetitions", "2"])
    assert len(order) == 3 * len(startup.CASES)
    assert order[: len(startup.CASES)] == order[len(startup.CASES) : -len(startup.CASES)][::-1]
    shown = capsys.readouterr().out.strip()
    assert shown in page.read_text() and "Machine: " in shown
    help_row = next(line for line in shown.splitlines() if "--help" in line)
    assert help_row.endswith(
        "| 1.00 | 1.00 | `import torch, transformers.trainer` | 0.25 | 0.25 | 1/3 |"
    )
    startup.main([*flags, "--table"])
    assert capsys.readouterr().out.strip() == shown and len(order) == 3 * len(startup.CASES)


def test_startup_process_that_fails_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="no such module"):
        startup.cpu_seconds(["-c", "raise ImportError('no such module')"], str(tmp_path))
