"""The benchmarks of one-shot compression and of a compression run, on tiny shapes."""

import compression_overhead
import one_shot
import torch
from results_file import read_lines


def page_with(path, name):
    path.write_text(f"<!-- report: {name} -->\n<!-- end of report -->\n")
    return str(path)


def test_one_shot_measures_a_process_once(tmp_path, monkeypatch):
    figures = one_shot.compress("tiny", 0)
    assert 0 < figures["packed"] < figures["dense"] == 4 * figures["parameters"]
    assert figures["peak"] >= figures["create_peak"] >= figures["import_peak"] > figures["dense"]
    assert 0 < sum(figures["parts"].values()) <= figures["seconds"]
    monkeypatch.setattr(one_shot, "measure", lambda *args: figures)
    flags = ["--shapes", "tiny", "--threads", str(torch.get_num_threads())]
    flags += ["--results", str(tmp_path / "rows.jsonl")]
    flags += ["--page", page_with(tmp_path / "page.md", "one shot")]
    one_shot.main(flags)
    one_shot.main(flags)
    (line,) = read_lines(tmp_path / "rows.jsonl")
    beyond = (line["peak"] - line["dense"]) / 1e6
    assert f"| {beyond:,.0f} | 1,074 |" in (tmp_path / "page.md").read_text()


def test_compression_overhead_splits_the_time(tmp_path):
    flags = ["--shape", "tiny", "--stage_steps", "2", "--batch", "2", "--length", "8"]
    flags += ["--seeds", "0", "--threads", str(torch.get_num_threads())]
    flags += ["--results", str(tmp_path / "rows.jsonl")]
    flags += ["--page", page_with(tmp_path / "page.md", "compression")]
    compression_overhead.main(flags)
    compression_overhead.main(flags)
    (line,) = read_lines(tmp_path / "rows.jsonl")
    plain, run = line["plain"], line["compression"]
    assert all(seconds > 0 for seconds in run.values())
    assert [part for part, seconds in plain.items() if seconds] == [
        "saving",
        compression_overhead.STEPS,
    ]
    total = sum(run.values())
    more = 100 * (total / sum(plain.values()) - 1)
    assert f"| {total:.1f} | {more:+.1f} |" in (tmp_path / "page.md").read_text()
