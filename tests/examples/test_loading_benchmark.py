"""The benchmark of loading: one process per load, one line per model, a table of ratios."""

import loading as benchmark
import pytest
from results_file import read_lines


@pytest.mark.slow
def test_dense_and_packed_models_are_measured_once(tmp_path, capsys, monkeypatch):
    flags = [
        *("--model", "tiny", "--block_size", "4", "--repetitions", "1", "--forwards", "2"),
        *("--shapes", "1x8", "2x8", "--threads", "1", "--results", str(tmp_path / "r.jsonl")),
    ]
    benchmark.main(flags)
    (line,) = read_lines(tmp_path / "r.jsonl")
    for kind in ("dense", "packed"):
        figures = line[kind]
        assert 0 < figures["load"] < figures["first_output"]
        assert 0 <= figures["load_peak"] <= figures["first_output_peak"]
        assert figures["cold_output"] > 0
        assert figures["forward 1x8"] > 0 and figures["forward 2x8"] > 0
    assert line["packed"]["file"] < line["dense"]["file"]
    monkeypatch.setattr(benchmark, "load_once", None)  # a finished model is not measured again
    benchmark.main(flags)
    assert read_lines(tmp_path / "r.jsonl") == [line]
    printed = capsys.readouterr().out
    ratio = f"{line['packed']['file'] / line['dense']['file']:.2f}"
    assert printed.count("| tiny | file | ") == 2 and f" MB | {ratio} |" in printed
    assert "| tiny | forward, 2x8 tokens | " in printed and "Machine: " in printed


def test_measurements_alternate_and_give_medians(monkeypatch):
    order = []

    def once(folder, warm_up, args, cold):
        if cold:
            return {"cold_output": 8.0}
        order.append(folder.rpartition("/")[2])
        return {"load": float(len(order))}

    monkeypatch.setattr(benchmark, "load_once", once)
    args = benchmark.parse(["--model", "tiny", "--block_size", "4", "--repetitions", "3"])
    figures = benchmark.measure("tiny", args)
    assert order == ["packed", "dense", "dense", "packed", "packed", "dense"]
    assert figures["packed"]["load"] == 4 and figures["dense"]["load"] == 3
    assert figures["packed"]["cold_output"] == 8


def test_failing_processes_and_empty_tables_are_errors(tmp_path):
    args = benchmark.parse(["--threads", "1"])
    with pytest.raises(RuntimeError, match="nowhere"):
        benchmark.load_once(str(tmp_path / "nowhere"), str(tmp_path / "nowhere"), args)
    with pytest.raises(ValueError, match="finished model"):
        benchmark.table([])
