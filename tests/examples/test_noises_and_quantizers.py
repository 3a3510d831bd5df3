"""The benchmark of noises and quantizers: rows run once and are resumed, tables are correct."""

import noises_and_quantizers as benchmark
import pytest
from results_file import read_lines

MORE = (
    "--sequence_length 16 --n_centroids 8 --num_train_epochs 0.5 --max_train_samples 16 "
    "--plots False"
)


@pytest.fixture
def flags(text_checkpoint, texts, tmp_path):
    texts["validation"].rename(tmp_path / "valid.txt")
    return [
        *("--task", "text", "--model_dir", str(text_checkpoint), "--data_dir", str(tmp_path)),
        *("--results", str(tmp_path / "results.jsonl"), "--work_dir", str(tmp_path / "runs")),
        *("--more", MORE),
    ]


def test_rows_run_once(flags, tmp_path, capsys):
    first, last = benchmark.ROWS[0], benchmark.ROWS[-1]
    rows = ["--rows", "0", str(len(benchmark.ROWS) - 1)]
    benchmark.main([*flags, *rows])
    lines = read_lines(tmp_path / "results.jsonl")
    assert [(line["key"]["noise"], line["key"]["compression"]) for line in lines] == [
        (first[0], first[2]),
        (last[0], last[2]),
    ]
    assert all(line["logits_bit_equal"] for line in lines)
    assert lines[1]["bytes"] < lines[0]["bytes"] < lines[0]["dense_bytes"]
    assert lines[0]["dense_perplexity"] > 1 < lines[0]["perplexity"]
    benchmark.main([*flags, *rows])
    assert read_lines(tmp_path / "results.jsonl") == lines
    assert not list((tmp_path / "runs").iterdir())
    assert capsys.readouterr().out.count("| none | PQ, one shot |") == 2


def test_flags_of_all_rows_are_valid():
    for task in benchmark.PQ:
        for row in benchmark.ROWS:
            if task not in benchmark.SHARED and "{shared}" in row[3]:
                continue
            words = ["--model_name_or_path", "m", "--output_dir", "o", "--train_file", "t"]
            args = benchmark.TASKS[task].parse([*words, *benchmark._settings(task, row)])
            noise = args.noise
            assert (noise is None) == (row[0] == "none")
            assert args.quantization.scheme in ("ipq", "fixed_point")


def test_table_of_known_results():
    def line(seed, accuracy):
        key = {"noise": "proxy", "compression": "iPQ", "settings": "--x", "seed": seed}
        return {
            "key": key, "accuracy": accuracy, "dense_accuracy": 0.7, "bytes": 2_000_000,
            "dense_bytes": 20_000_000, "examples": {"train": 3_000, "validation": 1_000},
            "command": "python b.py", "machine": "some processor",
        }  # fmt: skip

    rows = benchmark.table([line(1, 0.6), line(3, 0.62)], benchmark.TASKS["images"]).splitlines()
    assert rows[2] == "| proxy | iPQ | 70.0 | 61.0 | 60.0 / 62.0 | 2.000 | 10.0 |"
    assert "3,000 training and 1,000 validation examples; seeds 1, 3." in rows[4]
    with pytest.raises(ValueError, match="finished run"):
        benchmark.table([], benchmark.TASKS["images"])


def test_missing_flags_are_named(tmp_path):
    with pytest.raises(ValueError, match="--model_dir and --data_dir"):
        benchmark.main(["--task", "text"])
