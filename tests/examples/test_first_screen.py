"""The table and the picture of the README's first screen follow from the rows."""

import json
import re
import statistics
from pathlib import Path

import pytest

pytest.importorskip("scipy")
pytest.importorskip("sklearn")

import first_screen
import report
from published import STUDIES
from rows import read_rows, runs_of

RESULTS = report.ROOT / report.RESULTS
METHOD = "noise, bits allocated"


def lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def runs():
    rows = read_rows(RESULTS, STUDIES)
    return {
        name: runs_of([row for row in rows if row["key"]["study"] == name], study.split)
        for name, study in STUDIES.items()
    }


def glue_row(method: str, size: str, seed: int, accuracy: float) -> dict:
    key = {"study": "glue", "model": "minilm", "task": "sst2", "method": method, "size": size}
    return {
        "key": {**key, "seed": seed, "setting": {}},
        "dev": {"accuracy": accuracy},
        "dev_float32": {"accuracy": 0.9},
        "bytes": int(90e6 / int(size[:-1])),
        "float32_bytes": 90_000_000,
        "steps": 10,
        "seconds": 600.0 * seed,
    }


def test_box_has_the_figures_of_the_rows(runs):
    box = first_screen.box(RESULTS, runs)
    scores = [
        100 * line["dev"]["accuracy"]
        for line in lines("quality_glue.jsonl")
        if {**line["key"], "study": "glue", "task": "sst2", "method": METHOD, "size": "20x"}
        == line["key"]
    ]
    spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    assert f"SST-2, accuracy: {statistics.mean(scores):.1f}{spread} at 21.0x" in box
    (case,) = [
        line["variants"]
        for line in lines("speed.jsonl")
        if (line["key"]["case"], line["key"]["threads"]) == ("MiniLM, 1x128 tokens", 1)
    ]
    assert f" / {case['packed']['speed']:.1f} with" in box
    assert "1,500 steps of 32 sentences after the finetuning: 8 to 14 minutes at 21.0x" in box
    (shape,) = [line for line in lines("one_shot.jsonl") if line["key"]["shape"] == "roberta-base"]
    assert f"one shot: {shape['seconds']:.0f} s for the shape of RoBERTa-base, on 2 cores" in box
    peers = [
        line for line in lines("quality_glue_peers.jsonl")
        if (line["key"]["method"], line["key"]["size"]) == ("one shot", "13x")
    ]  # fmt: skip
    names = {"sst2": "accuracy", "cola": "matthews_correlation", "mrpc": "f1", "rte": "accuracy"}
    assert sorted(line["key"]["task"] for line in peers) == sorted(names)
    kept = [
        100 * line["dev"][name] / line["dev_float32"][name]
        for line in peers
        for name in [names[line["key"]["task"]]]
    ]
    assert f"one shot: {statistics.mean(kept):.1f} with {peers[0]['bytes'] / 1e6:.1f} MB" in box
    assert "torchao, int4, groups of 32: 96.5 with 13.6 MB if it were packed (its file: 25" in box


def test_box_shows_noise_at_each_size_once_there_are_rows(runs):
    glue = [glue_row("noise", "13x", seed, 0.88 + seed / 100) for seed in (1, 2)]
    glue += [glue_row("noise", "30x", 1, 0.8), glue_row("no noise", "30x", 1, 0.7)]
    box = first_screen.box(RESULTS, {**runs, "glue": runs_of(glue)})
    line = "SST-2, accuracy: 89.5 ± 0.7 at 13.0x; 80.0 at 30.0x, 70.0 without noise (float32 90.0"
    assert line in box
    averages = (
        "average over SST-2 in % of float32: 99.4 ± 0.8 at 13.0x; 88.9 at 30.0x, 77.8 without"
    )
    assert averages in box
    assert "10 to 20 minutes at 13.0x; 10 minutes at 30.0x" in box


def test_box_shows_allocated_bits_at_sizes_that_have_as_many_runs(runs):
    other = ("no noise", "20x"), ("no noise, bits allocated", "20x")
    glue = [glue_row(f"noise{kind}", size, seed, score + seed / 100)
            for kind, size, score, seeds in (("", "20x", 0.6, (1, 2)), ("", "30x", 0.5, (1, 2)),
                                             (", bits allocated", "20x", 0.8, (1, 2)),
                                             (", bits allocated", "30x", 0.7, (1,)))
            for seed in seeds]  # fmt: skip
    glue += [glue_row(*each, 1, 0.75 - 0.05 * n) for n, each in enumerate(other)]
    found = {**runs, "glue": runs_of(glue)}
    box = first_screen.box(RESULTS, found)
    assert "accuracy: 81.5 ± 0.7 at 20.0x, 70.0 without noise; 51.5 ± 0.7 at 30.0x (float32" in box
    drawn = {
        ("noise, bits allocated", "20x"),
        ("no noise, bits allocated", "20x"),
        ("noise", "30x"),
    }
    only = [run for run in found["glue"] if (run.method, run.size) in drawn]
    assert first_screen.pictures(found) == first_screen.pictures({**found, "glue": only})


def test_box_has_the_average_of_sizes_with_all_tasks_only(runs):
    glue = [
        glue_row(method, size, 1, 0.8)
        for method in ("noise", "no noise")
        for size in ("20x", "30x")
    ]
    other = [glue_row(method, "20x", 1, 0.7) for method in ("noise", "no noise")]
    for line in other:
        line["key"]["task"] = "rte"
    box = first_screen.box(RESULTS, {**runs, "glue": runs_of([*glue, *other])})
    average = f"{100 * (0.8 / 0.9 + 0.7 / 0.9) / 2:.1f}"
    assert f"SST-2, RTE in % of float32: {average} at 20.0x, {average} without noise." in box


def test_box_shows_noise_that_has_no_counterpart_of_its_size(runs):
    trained = [run for run in runs["language_model"] if run.method == "trained noise"]
    box = first_screen.box(RESULTS, {**runs, "language_model": trained})
    (line,) = [part for part in re.split(r"<br>|\n", box) if "WikiText-2" in part][:1]
    assert " without noise" not in line and "(float32 7.66" in line


def test_pictures_show_the_same_in_colors_that_can_be_seen(runs):
    light, dark = first_screen.pictures(runs).values()
    assert re.sub("#[0-9a-f]{6}", "", light) == re.sub("#[0-9a-f]{6}", "", dark)
    for text, background in ((light, "#ffffff"), (dark, "#0d1117")):
        marks = set(re.findall(r'translate[^/]*fill="(#[0-9a-f]{6})"', text))
        words = set(re.findall(r'<svg[^>]*fill="(#[0-9a-f]{6})"', text))
        assert len(marks) >= 5 and f'rx="6" fill="{background}"' in text
        assert all(contrast(color, background) > 2 for color in marks)
        assert all(contrast(color, background) > 10 for color in words)


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio of two colors, as WCAG 2 defines it."""

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_readme_shows_both_pictures():
    text = Path(report.ROOT / report.README).read_text()
    names = re.findall(r'(?:srcset|src)="([^"]+)"', text)
    assert [Path(name).name for name in names] == list(reversed(first_screen.PICTURES))
    assert all((report.ROOT / name).is_file() for name in names)
