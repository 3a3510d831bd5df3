"""The benchmark of k-means: blocks from a seed, one line per case, a table of ratios."""

import kmeans as benchmark
import torch
from results_file import read_lines


def test_cases_are_measured_once_and_fill_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(benchmark.CASES, "tiny", (16, 64, 4))
    exact = benchmark.blocks_of("tiny", 0)
    monkeypatch.setattr(benchmark, "faiss_kmeans", lambda points, k, n, seed: points[:k])
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n<!-- report: kmeans -->\n<!-- end of report -->\n")
    flags = ["--cases", "tiny", "--n_centroids", "16", "--seeds", "0", "--repetitions", "1"]
    flags += ["--results", str(tmp_path / "rows.jsonl"), "--page", str(page)]
    threads = torch.get_num_threads()
    benchmark.main([*flags, "--threads", str(threads)])
    (line,) = read_lines(tmp_path / "rows.jsonl")
    assert exact.shape == (256, 4)
    assert 0 < line["objective"]["own"] < line["objective"]["faiss"]
    monkeypatch.setattr(benchmark, "measure", None)  # a finished case is not measured again
    benchmark.main([*flags, "--threads", str(threads)])
    ratio = line["objective"]["own"] / line["objective"]["faiss"]
    assert f"| {ratio:.4f} |" in page.read_text()
    assert "Machine: " in capsys.readouterr().out
