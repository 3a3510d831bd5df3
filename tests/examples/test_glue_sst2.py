"""The benchmark of the README's table: it can be resumed, and its table is correct."""

import json
import statistics

import pytest

pytest.importorskip("hf_quantnoise")

import glue_sst2


@pytest.fixture
def flags(tiny_model, write, sentences, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name, count, seed in (("train", 64, 0), ("dev", 24, 1)):
        texts, labels = sentences(count, seed)
        write(f"{name}.parquet", {"sentence": texts, "label": labels})
    values = {
        "model_dir": tiny_model,
        "data_dir": tmp_path,
        "results": tmp_path / "results.jsonl",
        "work_dir": tmp_path / "runs",
        "train_samples": 48,
        "epochs": 1,
        "n_centroids": 8,
        "stage_epochs": 0.5,
        "batch_size": 16,
        "noise_block_size": 4,
    }
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return [*words, "--seeds", "1", "2", "--noises", "proxy", "--block_sizes", "4"]


@pytest.mark.slow
def test_runs_are_recorded_once_and_resumed(flags, tmp_path, capsys, monkeypatch):
    calls = []
    real = glue_sst2.run

    def counted(args):
        calls.append(args.training.output_dir)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(args)

    monkeypatch.setattr(glue_sst2, "run", counted)
    methods = ["--methods", "one shot", "stages, teacher"]
    with pytest.raises(KeyboardInterrupt):
        glue_sst2.main([*flags, *methods])
    lines = glue_sst2.read_lines(tmp_path / "results.jsonl")
    assert [line["key"]["method"] for line in lines] == ["float32", "one shot"]

    glue_sst2.main([*flags, *methods])
    lines = glue_sst2.read_lines(tmp_path / "results.jsonl")
    assert len(lines) == 6 and len(calls) == 3 + 4
    assert len({json.dumps(line["key"]) for line in lines}) == 6
    assert all(line["logits_bit_equal"] for line in lines if line["key"]["method"] != "float32")
    assert all(line["examples"] == {"train": 48, "validation": 24} for line in lines)
    kept = sorted(path.name for path in (tmp_path / "runs").glob("*/*") if path.is_dir())
    assert kept == ["dense", "dense"]

    glue_sst2.main([*flags, *methods])
    assert len(calls) == 7
    assert capsys.readouterr().out.count("| proxy p=0.1 | stages, teacher | 4 |") == 2


def test_table_of_known_results():
    def line(seed, method, accuracy, size):
        return {
            "key": {
                "seed": seed,
                "method": method,
                "noise": "none",
                "block_size": "4",
                "n_centroids": "256",
            },
            "accuracy": accuracy,
            "bytes": size,
            "dense_bytes": 90_000_000,
            "examples": {"train": 10_000, "validation": 872},
            "command": "python benchmarks/glue_sst2.py",
            "machine": "some processor",
        }

    lines = [line(seed, "one shot", 0.8 + seed / 100, 6_000_000) for seed in (1, 2, 3)]
    lines.append(line(2, "stages, teacher", 0.9, 5_000_000))
    lines[-1]["key"]["stage_epochs"] = 2.0
    rows = glue_sst2.table(lines).splitlines()
    spread = statistics.stdev([81.0, 82.0, 83.0])
    figures = f"82.0 ± {spread:.1f} | 81.0 / 82.0 / 83.0 | 6.00 | 15.0"
    assert rows[2] == f"| none | one shot | 4 | 256 |  | {figures} |"
    assert rows[3] == "| none | stages, teacher | 4 | 256 | 2 | 90.0 | - / 90.0 / - | 5.00 | 18.0 |"
    assert "seeds 1, 2, 3" in rows[5] and "10,000 training and 872 dev" in rows[5]
    assert rows[6] == "Command: `python benchmarks/glue_sst2.py`"


def test_settings_determine_folders_and_keys(flags):
    def folder(*more):
        (args,) = glue_sst2.HfArgumentParser(
            glue_sst2.BenchmarkArguments
        ).parse_args_into_dataclasses([*flags, *more])
        dense, jobs = next(glue_sst2._jobs(args))
        return dense.folder, [job.key for job in jobs]

    assert folder() == folder()
    assert folder()[0] != folder("--learning_rate", "1e-3")[0]
    assert folder()[1] != folder("--stage_learning_rate", "1e-3")[1]
    one_shot = [keys[0] for keys in (folder()[1], folder("--stage_epochs", "2")[1])]
    assert one_shot[0] == one_shot[1], "one shot has no stage settings"


def test_invalid_flags_are_named(flags):
    with pytest.raises(ValueError, match=r"--methods 'magic'.*one shot"):
        glue_sst2.main([*flags, "--methods", "magic"])
    with pytest.raises(ValueError, match=r"--block_sizes 'x'"):
        glue_sst2.main([*flags, "--block_sizes", "x"])
    with pytest.raises(ValueError, match=r"--results .*finished run"):
        glue_sst2.main([*flags, "--table"])
