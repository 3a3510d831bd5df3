"""The benchmark of options: starts and rows run once, tables are correct."""

import ablations as benchmark
import pytest
from ablation_rows import CLEAN, STARTS, TABLES
from real_tasks import TASKS
from results_file import read_lines

MORE = (
    "--sequence_length 16 --block_size 4 --n_centroids 8 --num_train_epochs 0.5 "
    "--max_train_samples 16 --save_strategy no --plots False"
)
ROWS = ["plain", "noise before, clean teacher"]


@pytest.fixture
def flags(text_checkpoint, texts, tmp_path):
    texts["validation"].rename(tmp_path / "valid.txt")
    return [
        *("--task", "text", "--model_dir", str(text_checkpoint), "--data_dir", str(tmp_path)),
        *("--results", str(tmp_path / "results.jsonl"), "--work_dir", str(tmp_path / "runs")),
        *("--table", "noise", "--seeds", "1", "--more", MORE, "--rows", *ROWS),
    ]


def test_starts_and_rows_run_once(flags, tmp_path, capsys):
    benchmark.main(flags)
    lines = read_lines(tmp_path / "results.jsonl")
    assert [(line["key"]["start"], line["key"]["row"]) for line in lines] == [
        (CLEAN, "float32"),
        (CLEAN, ROWS[0]),
        ("pq", "float32"),
        ("pq", ROWS[1]),
    ]
    assert lines[0]["bytes"] > lines[1]["bytes"] and lines[1]["logits_bit_equal"]
    assert lines[1]["dense_perplexity"] == pytest.approx(lines[0]["perplexity"], rel=1e-6)
    assert lines[3]["dense_perplexity"] == pytest.approx(lines[2]["perplexity"], rel=1e-6)
    benchmark.main(flags)
    assert read_lines(tmp_path / "results.jsonl") == lines
    kept = sorted(path.name for path in (tmp_path / "runs" / "text").iterdir())
    assert kept == [f"{CLEAN.replace(' ', '_')}-1", "pq-1"]
    assert capsys.readouterr().out.count("| plain |") == 2


def test_starts_with_other_settings_are_refused(flags):
    benchmark.main([*flags[:-2], ROWS[0]])
    with pytest.raises(ValueError, match="--work_dir"):
        benchmark.main([*(word.replace("epochs 0.5", "epochs 1") for word in flags)])


@pytest.mark.parametrize(
    ("task", "table"), [(task, table) for table in TABLES for task in TABLES[table]]
)
def test_flags_of_all_rows_are_valid(task, table):
    words = ["--model_name_or_path", "m", "--output_dir", "o", "--train_file", "t"]
    words += TASKS[task].flags.split()
    rows = TABLES[table][task]
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        args = TASKS[task].parse([*words, *row.flags.split()])
        noise = args.noise
        assert args.quantization.scheme in ("ipq", "additive")
        assert not args.compression.keep_noise or noise.noise == "pq"
        start = TASKS[task].parse([*words, *STARTS[task][row.start].split()])
        assert (start.noise is None) == ("pq" not in row.start)


def test_table_of_known_results(tmp_path):
    def line(row, seed, accuracy, size=2_000_000):
        return {
            "key": {"task": "sentences", "start": CLEAN, "row": row, "seed": seed},
            "accuracy": accuracy, "bytes": size, "dense_bytes": 20_000_000,
            "examples": {"train": 3_000, "validation": 1_000}, "command": "python b.py",
            "machine": "some processor", "stages": [{}, {"finetuning": {"train_loss": accuracy}}],
        }  # fmt: skip

    args = benchmark.BenchmarkArguments(task="sentences", table="codebooks", print=True)
    lines = [line("float32", 1, 0.8), line("float32", 3, 0.9), line("plain", 1, 0.6)]
    lines += [line("plain", 3, 0.64), line("row scale", 3, 0.7)]
    rows = benchmark.table(args, lines).splitlines()
    assert (
        rows[2]
        == "| plain | 85.0 ± 7.1 | 62.0 ± 2.8 | 60.0 / 64.0 | 0.620 ± 0.028 | 2.000 | 10.0 |"
    )
    assert rows[3] == "| row scale | 90.0 | 70.0 | - / 70.0 | 0.700 | 2.000 | 10.0 |"
    with pytest.raises(ValueError, match="finished row of --table"):
        benchmark.table(args, lines[:2])


def test_invalid_flags_are_named():
    with pytest.raises(ValueError, match=r"--table 'size'.*--task text"):
        benchmark.main(["--task", "text", "--table", "size"])
    with pytest.raises(ValueError, match=r"--rows 'plane'.*plain"):
        benchmark.main(["--task", "text", "--table", "noise", "--rows", "plane"])
    with pytest.raises(ValueError, match="--model_dir and --data_dir"):
        benchmark.main(["--task", "text", "--table", "noise"])
