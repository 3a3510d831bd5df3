"""The benchmark of noise: samples until they agree, one line per case, shares of refreshes."""

import noise_overhead as benchmark
import pytest
import torch
from results_file import read_lines


def test_samples_end_when_the_quartiles_agree():
    rates = []
    spent = {0.0: 1.0, 0.1: 1.03}
    slowdowns, clean = benchmark.ratios(lambda: spent[rates[-1]], rates.append, 0.1, seconds=60)
    assert slowdowns == pytest.approx([1.03] * benchmark.MIN_SAMPLES)
    assert clean == pytest.approx([1.0] * benchmark.MIN_SAMPLES)
    measured = rates[4:]
    assert measured[:8] == [0.1, 0.0, 0.0, 0.1, 0.0, 0.1, 0.1, 0.0]


def test_samples_end_after_a_time_if_they_differ():
    rates, steps = [], iter(range(1, 10_000))
    slowdowns, _ = benchmark.ratios(lambda: float(next(steps) ** 3), rates.append, 0.1, seconds=0.0)
    assert len(slowdowns) == 2


def test_noise_overhead_measures_each_case_once(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- report: noise -->\n<!-- end of report -->\n")
    names = ["proxy", "int8 channel", "pq, trained centroids, p=1", "pq, tables too"]
    settings = ["base", "bf16 autocast", "gradient checkpointing"]
    flags = ["--shape", "tiny", "--length", "8", "--seconds", "0", "--noise", *names]
    flags += ["--settings", *settings, "--threads", str(torch.get_num_threads())]
    flags += ["--results", str(tmp_path / "rows.jsonl"), "--page", str(page)]
    benchmark.main(flags)
    lines = read_lines(tmp_path / "rows.jsonl")
    cases = [(line["key"]["noise"], line["key"]["setting"]) for line in lines]
    assert cases == [("proxy", each) for each in settings] + [(name, "base") for name in names[1:]]
    for line in lines:
        low, middle, high = line["quartiles"]
        assert 0 < low <= middle <= high and line["step"] > 0 and line["samples"] >= 2
    assert [line["p"] for line in lines] == [0.1] * 4 + [1.0, 0.1]
    monkeypatch.setattr(benchmark, "measure", None)  # finished cases are not measured again
    benchmark.main(flags)
    shown = page.read_text().partition("-->")[2].partition("<!--")[0].strip()
    assert shown.startswith("| noise |") and capsys.readouterr().out.strip().endswith(shown)


def test_table_adds_the_share_of_refreshes():
    key = {"noise": "int8 minmax", "setting": "base"}
    line = {"key": key, "quartiles": [1.01, 1.02, 1.03], "samples": 5, "step": 0.5, "fit": 1.0,
            "refresh": 0.1, "command": "c", "machine": "m"}  # fmt: skip
    row = benchmark.table([line]).splitlines()[2]
    assert "| +2.0% | +1.0% to +3.0% | 5 | 6% | +4.0% (every 10) | 500 |" in row
    assert benchmark.intervals("pq, trained centroids, p=1") == [1, 20]
    assert benchmark.intervals("proxy") == []
