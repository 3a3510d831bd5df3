"""The report of the quality studies: tables, pages and plots of rows whose answers are known."""

import json
import re
import statistics
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree

import pytest

pytest.importorskip("scipy")
pytest.importorskip("sklearn")

import report
from comparisons import Bootstraps
from pareto import Axis, pareto_svg
from published import STUDIES
from rows import read_rows, runs_of
from sklearn.metrics import f1_score
from support.quality_rows import cells, digits, row
from tables import baselines_table, goals_table, peers_table, readme_table, scores_table


@pytest.fixture
def stored(tmp_path):
    return Bootstraps(tmp_path / "quality_intervals.json")


def test_tables_have_means_spreads_and_shares():
    rows = []
    for seed, right in ((1, 71), (2, 80), (3, 92)):
        rows.append(row("noise", "sst2", seed, digits(100, right)))
        rows.append(row("noise", "rte", seed, digits(100, 60), seconds=60.0))
    runs = runs_of(rows)
    found = cells(scores_table(runs), "noise")
    averages = [(right / 80 + 60 / 80) / 2 for right in (71, 80, 92)]
    share = f"{100 * statistics.mean(averages):.1f} ± {100 * statistics.stdev(averages):.1f}"
    assert found == [
        "20x", "noise", "3", "81.0 ± 10.5 (101.2%)", "60.0 ± 0.0 (75.0%)", share,
        "4.50", "20.0x", "3.0",
    ]  # fmt: skip
    goal = cells(goals_table(runs, STUDIES["glue"]), "noise")
    assert goal[-1] == "not judged: 2 of 4 tasks"
    goal = cells(goals_table(runs, replace(STUDIES["glue"], n_tasks=2)), "noise")
    assert goal[-1] == "missed by 9.9 points"
    study = replace(STUDIES["glue"], main=("noise", "no noise"))
    table = readme_table(runs, study)
    assert cells(table, "20.0x smaller, noise")[1:3] == ["4.5 MB", "81.0 ± 10.5"]
    assert "mean and standard deviation over seeds" in table
    other = runs_of([row("no noise", "sst2", 1, digits(10, 8))])
    table = readme_table([*other, *runs], study)
    assert cells(table, "20.0x smaller, no noise")[-1] == "-", "a task is missing"
    assert table.index("smaller, noise") < table.index("smaller, no noise"), "in the order of main"
    assert readme_table(other, study) == ""


def test_incomplete_seeds_do_not_count_in_the_average():
    rows = [row("noise", "sst2", seed, digits(10, 8)) for seed in (1, 2)]
    rows.append(row("noise", "rte", 1, digits(10, 4)))
    found = cells(scores_table(runs_of(rows)), "noise")
    assert found[2] == "1" and found[5] == "75.0"
    rows.append(row("no noise", "sst2", 1, digits(10, 8)))
    assert cells(scores_table(runs_of(rows)), "no noise")[5] == "-", "a task is missing"


def write(folder, rows):
    (folder / "quality_glue.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))


def test_invalid_rows_are_named(tmp_path):
    rows = [row("noise", "sst2", 1, "01")] * 2
    write(tmp_path, rows)
    with pytest.raises(ValueError, match="two rows of"):
        runs_of(read_rows(tmp_path, STUDIES))
    other = row("noise", "sst2", 2, "01")
    other["key"]["setting"] = {"epochs": 2}
    write(tmp_path, [rows[0], other])
    with pytest.raises(ValueError, match="different settings for different seeds"):
        runs_of(read_rows(tmp_path, STUDIES))
    write(tmp_path, [{k: v for k, v in rows[0].items() if k != "steps"}])
    with pytest.raises(ValueError, match="field 'steps' is missing"):
        runs_of(read_rows(tmp_path, STUDIES))
    other["key"]["study"] = "misspelt"
    write(tmp_path, [other])
    with pytest.raises(ValueError, match=r"misspelt.*unknown study"):
        read_rows(tmp_path, STUDIES)


def test_majority_class_is_scored_with_the_labels_once(tmp_path):
    pandas = pytest.importorskip("pandas")
    labels = {"sst2": ([1, 1, 0], [0, 0, 0, 1]), "mrpc": ([1, 1, 0], [0, 1, 1, 1])}
    for task, parts in labels.items():
        (tmp_path / task).mkdir()
        for split, values in zip(("train", "dev"), parts, strict=True):
            pandas.DataFrame({"label": values}).to_parquet(tmp_path / task / f"{split}.parquet")
    path = tmp_path / "quality_intervals.json"
    first = Bootstraps(path, str(tmp_path))
    scores = {"sst2": first.majority("sst2", "accuracy"), "mrpc": first.majority("mrpc", "f1")}
    assert scores == {"sst2": 0.25, "mrpc": f1_score(labels["mrpc"][1], [1, 1, 1, 1])}
    path.write_text(first.text())
    assert Bootstraps(path).majority("mrpc", "f1") == scores["mrpc"]
    runs = runs_of([row("noise", "sst2", 1, "0110"), row("noise", "mrpc", 1, "0110", "f1")])
    found = cells(scores_table(runs, scores), "majority class")
    share = 100 * (0.25 + scores["mrpc"]) / 2 / 0.8
    assert found[3] == "25.0 (31.2%)" and found[5] == f"{share:.1f}"


def test_float32_rows_of_a_study_are_listed_by_setting():
    def line(rate, seed, **more):
        key = {"study": "images", "task": "cifar10", "model": "net", "method": "float32"}
        key |= {"size": None, "seed": seed, "setting": {"learning_rate": rate}}
        return {"key": key, "seconds": 60.0, "held_out": {"accuracy": 0.5, "loss": 1.0}, **more}

    lines = [line(1e-3, 1), line(2e-3, 1), line(2e-3, 2, dev={"accuracy": 0.6, "loss": 0.9})]
    assert runs_of(lines) == []
    found = cells(baselines_table(lines), "learning rate 0.002")
    assert found[3:] == ["1, 2", "50.0 ± 0.0", "1.000 ± 0.000", "60.0", "0.900", "1.0"]


def test_blocks_of_a_page_are_filled_again():
    page = "a\n<!-- report: glue -->\n\nold\n\n<!-- end of report -->\nb"
    filled = report.fill(page, {"glue": "new"})
    assert filled == "a\n<!-- report: glue -->\n\nnew\n\n<!-- end of report -->\nb"
    assert report.fill(filled, {"glue": "new"}) == filled
    assert report.fill(page, {"glue": ""}) == page
    with pytest.raises(ValueError, match="report: images"):
        report.fill(page, {"images": "new"})


def test_only_studies_with_rows_have_a_section(stored):
    runs = runs_of([row("noise", "sst2", 1, "0110")])
    stored.stored["majority sst2 accuracy"] = {"mean": 0.5}
    text = report.section(STUDIES["glue"], runs, [], stored)
    assert text.startswith("## GLUE\n") and "| 20x | noise |" in text
    assert report.section(STUDIES["images"], [], [], stored) == ""


def test_settings_are_shown_by_their_held_out_scores(stored):
    line = row("noise", "sst2", 1, digits(10, 5), held_out={"accuracy": 0.6, "loss": 0.3})
    line["held_out_float32"] = {"accuracy": 0.9}
    study = STUDIES["settings"]
    text = report.section(study, runs_of([line], study.split), [], stored)
    assert cells(text, "20x", "noise", "66.7")[3] == "60.0 (66.7%)"
    assert "held-out training examples" in text


@pytest.mark.parametrize(("low", "high"), [(3.03, 6.99), (0.07, 0.13), (4.2, 4.3), (1, 90)])
@pytest.mark.parametrize("log", [False, True])
def test_ticks_are_round_and_apart(low, high, log):
    axis = Axis([low, high], 52, 316, log)
    ticks = axis.ticks(44)
    assert len(ticks) >= 2 and all(52 <= axis(tick) <= 316 for tick in ticks)
    assert all(axis(b) - axis(a) >= 44 for a, b in pairwise(ticks))
    assert all(len(f"{tick:.6g}") <= 5 for tick in ticks)


def test_plot_has_a_mark_per_method_and_labels_apart():
    rows = [
        row(f"method <{method}>", task, seed, digits(100, 60 + 9 * method + seed), size=size)
        for method in range(4)
        for task in ("sst2", "rte", "cola")
        for seed in (1, 2)
        for size in ("13x", "20x", "30x")
    ]
    text = pareto_svg(runs_of(rows))
    assert text == pareto_svg(runs_of(rows))
    root = ElementTree.fromstring(text)
    tag = "{http://www.w3.org/2000/svg}"
    width, height = (float(root.get("viewBox").split()[i]) for i in (2, 3))
    boxes = []
    for label in root.iter(f"{tag}text"):
        wide = 7.2 * len(label.text)  # at most, at a font size of 12
        x = (
            float(label.get("x"))
            - {None: 0, "middle": wide / 2, "end": wide}[label.get("text-anchor")]
        )
        boxes.append(
            (x, float(label.get("y")) - 11, x + wide, float(label.get("y")) + 2, label.text)
        )
    for index, a in enumerate(boxes):
        assert a[0] >= 0 and a[2] <= width and a[1] >= 0 and a[3] <= height, a
        for b in boxes[index + 1 :]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (a, b)
    names = [label.text for label in root.iter(f"{tag}text")]
    assert [name for name in names if "<" in name] == [f"method <{i}>" for i in range(4)]
    dashed = [path for path in root.iter(f"{tag}path") if path.get("stroke-dasharray")]
    assert len(dashed) == 4 + 1, "one line per panel, and that of the legend"
    assert len(re.findall("translate", text)) == 4 * 3 * 4 + 4


def test_page_readme_and_plots_agree_with_the_rows():
    """If this fails, run benchmarks/quality/report.py."""
    for path, text in report.files(report.ROOT).items():
        assert path.is_file() and path.read_text() == text, path.relative_to(report.ROOT)


def peer_row(method, seed, right, size, megabytes, library="torchao", steps=0):
    made = row(method, "sst2", seed, digits(100, right), steps=steps, bytes=int(megabytes * 1e6),
               size="1x", file_bytes=20_000_000)  # fmt: skip
    made["key"] |= {"study": "glue_peers", "size": size, "setting": {"library": library}}
    return made


def test_peers_are_compared_with_the_best_model_that_is_not_larger():
    own = "hf_quantnoise"
    peers = runs_of(
        [peer_row("torchao", seed, 60, "int2", 6.0) for seed in (1, 2)]
        + [peer_row("torchao", 1, 50, "int1", 2.0)]
        + [peer_row("one shot", seed, 50 + 8 * seed, "13x", 5.9, own) for seed in (1, 2)]
        + [peer_row("one shot", 1, 40, "20x", 4.0, own), peer_row("int8", 1, 99, "int8", 9.0, own)]
    )
    trained = runs_of([row("noise", "sst2", seed, digits(100, 80)) for seed in (1, 2, 3)])
    table = peers_table([*peers, *trained])
    assert len(table.splitlines()) == 2 + 2, "a line for each model of another library"
    found = cells(table, "int2")
    assert found[2:6] == ["6.00", "20.00", "1 x 2", "75.0 ± 0.0"]
    leads = [100 * (50 + 8 * seed - 60) / 80 for seed in (1, 2)]
    spread = f"{statistics.mean(leads):.1f} ± {statistics.stdev(leads):.1f}"
    assert found[6:] == ["one shot, 13x, 5.90 MB", spread, "noise, 20x, 4.50 MB", "25.0 ± 0.0"]
    assert cells(table, "int1")[6:] == ["-", "", "-", ""]
    assert peers_table(trained) == ""


def test_section_of_peers_draws_the_study_beside_it(stored):
    peers = runs_of([peer_row("torchao", 1, 60, "int2", 6.0)])
    trained = runs_of([row("noise", "sst2", 1, digits(100, 80))])
    text = report.section(STUDIES["glue_peers"], peers, [], stored, trained)
    assert "noise, 20x, 4.50 MB" in text and "glue_peers-minilm.svg" in text
    assert "| 20x | noise |" not in text, "the scores are those of the study alone"
