"""The benchmark of centroids: rows run once, with about the same number of bytes."""

import codebooks as benchmark
import pytest
import torch
from results_file import provenance, read_lines
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_quantnoise.quantizers import quantizer_from_dict
from hf_quantnoise.structure import find_layers


@pytest.fixture
def flags(tiny_model, sentences, write, tmp_path):
    for name, count in (("train", 40), ("dev", 24)):
        texts, labels = sentences(count, 0)
        write(f"{name}.parquet", {"sentence": texts, "label": labels})
    folder = tmp_path / "run" / "dense"
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model)
    with torch.no_grad():  # with a new head, divergences would be rounding errors
        model.classifier.weight.normal_()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return [
        *("--checkpoint", str(folder), "--data_dir", str(tmp_path), "--batch_size", "8"),
        *("--results", str(tmp_path / "results.jsonl"), "--block_size", "4"),
        *("--n_centroids", "16", "--calibration_batches", "2"),
    ]


def test_rows_run_once(flags, tmp_path, capsys):
    benchmark.main(flags)
    lines = read_lines(tmp_path / "results.jsonl")
    assert [line["key"]["row"] for line in lines] == list(benchmark.ROWS)
    assert all(line["divergence"] > 0 and line["bytes"] < line["dense_bytes"] for line in lines)
    assert len({line["divergence"] for line in lines}) == len(lines)
    benchmark.main(flags)
    assert read_lines(tmp_path / "results.jsonl") == lines
    printed = capsys.readouterr().out
    assert printed.count("| two codebooks |") == 2 and "`run/dense` in float32" in printed


def test_rows_differ_by_less_than_two_percent_in_bytes():
    args = benchmark.BenchmarkArguments(checkpoint="x", block_size="8")
    (layer,) = find_layers(nn.Sequential(nn.Linear(384, 1536)))
    plain, *others = (
        quantizer_from_dict(benchmark._config(args, row).quantizer_settings(layer)).packed_bytes(
            layer.rows, layer.columns
        )
        for row in benchmark.ROWS
    )
    assert all(abs(other / plain - 1) < 0.02 for other in others)


def test_invalid_flags_are_named():
    with pytest.raises(ValueError, match="--rows 'odd'"):
        benchmark.main(["--checkpoint", "x", "--rows", "odd"])
    with pytest.raises(ValueError, match="--checkpoint"):
        benchmark.main([])
    with pytest.raises(ValueError, match="finished row"):
        benchmark.table([])


def test_provenance_has_the_singular_of_one_thread():
    lines = [{"command": "run", "machine": f"CPU, {threads} threads"} for threads in (1, 11)]
    assert provenance(lines)[1:] == ["Machine: CPU, 1 thread", "Machine: CPU, 11 threads"]
