"""The benchmark of k-means: blocks from a seed, one line per case, tables of ratios and times."""

import kmeans as benchmark
import pytest
import torch
from results_file import read_lines

PAGE = "".join(
    f"<!-- report: {name} -->\n<!-- end of report -->\n" for name in ("kmeans", "kmeans scaling")
)


def test_cases_are_measured_once_and_fill_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(benchmark.CASES, "tiny", (16, 64, 4))
    exact = benchmark.blocks_of("tiny", 0)
    monkeypatch.setattr(benchmark, "faiss_kmeans", lambda points, k, n, seed: points[:k])
    monkeypatch.setattr(benchmark, "find_spec", lambda name: True)
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    flags = ["--parts", "faiss", "--cases", "tiny", "--n_centroids", "16", "--seeds", "0"]
    flags += ["--repetitions", "1", "--results", str(tmp_path / "rows.jsonl"), "--page", str(page)]
    threads = torch.get_num_threads()
    benchmark.main([*flags, "--threads", str(threads)])
    (line,) = read_lines(tmp_path / "rows.jsonl")
    assert exact.shape == (256, 4)
    assert 0 < line["objective"]["own"] < line["objective"]["faiss"]
    monkeypatch.setattr(benchmark, "measure", pytest.fail)  # a finished case is not measured again
    benchmark.main([*flags, "--threads", str(threads)])
    ratio = line["objective"]["own"] / line["objective"]["faiss"]
    assert f"| {ratio:.4f} |" in page.read_text()
    assert "Machine: " in capsys.readouterr().out


def test_time_against_blocks_and_centroids(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "BLOCKS", [256, 512])
    monkeypatch.setattr(benchmark, "CENTROIDS", [4, 8])
    monkeypatch.setattr(benchmark, "FIXED", {"n_blocks": 256, "n_centroids": 8})
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    flags = ["--parts", "scaling", "--seeds", "0", "--repetitions", "1"]
    flags += ["--threads", str(torch.get_num_threads()), "--page", str(page)]
    benchmark.main([*flags, "--results", str(tmp_path / "rows.jsonl")])
    lines = read_lines(tmp_path / "rows.jsonl")
    varied = [(line["key"]["varied"], line["key"][line["key"]["varied"]]) for line in lines]
    assert varied == [("n_blocks", 256), ("n_blocks", 512), ("n_centroids", 4), ("n_centroids", 8)]
    assert "| threads, blocks | 256 | 512 | exponent |" in page.read_text()
    assert benchmark.exponent({n: 3 * n**1.5 for n in (1, 2, 4, 8)}) == pytest.approx(1.5)


def test_comparison_without_faiss_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None)
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    benchmark.main(["--parts", "faiss", "--threads", str(torch.get_num_threads()),
                    "--results", str(tmp_path / "rows.jsonl"), "--page", str(page)])  # fmt: skip
    assert "pip install faiss-cpu" in capsys.readouterr().err
    assert read_lines(tmp_path / "rows.jsonl") == []
