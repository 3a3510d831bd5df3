#!/usr/bin/env python
"""Write the tables and plots of the quality studies into the documentation.

    python benchmarks/quality/report.py --data_dir ../shared/data
    python benchmarks/quality/report.py --check

Reads ``quality_<study>.jsonl`` of the studies in ``published.py`` and ``glue_float32.jsonl``, in
benchmarks/results; writes the parts of results.md and ablations.md in docs/reference, and of
README.md, between ``<!-- report: NAME -->`` and ``<!-- end of report -->``; plots in
docs/reference/results/; and the bootstrap intervals in ``quality_intervals.json``. ``--data_dir``
is needed for new intervals of F1 and Matthews correlation, and for the majority class.
``--check`` writes nothing and exits with 1 if a file is out of date.
"""

from __future__ import annotations

import os
import re
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import ablation_page
import first_screen
from comparisons import Bootstraps, comparisons_table
from pages import fill
from pareto import pareto_svg
from published import STUDIES, Study
from results_file import provenance, read_lines
from rows import Run, grouped, is_baseline, read_rows, runs_of
from tables import (
    baselines_table,
    details_table,
    goals_table,
    peers_table,
    readme_table,
    scores_table,
)

ROOT = Path(__file__).resolve().parents[2]
PAGE, README = Path("docs/reference/results.md"), Path("README.md")
ABLATIONS = Path("docs/reference/ablations.md")
RESULTS, PLOTS = Path("benchmarks/results"), Path("docs/reference/results")


def plot_name(runs: list[Run]) -> str:
    """Return the file name of the plot of a study and model."""
    return re.sub(r"[^\w-]", "_", f"{runs[0].study}-{runs[0].model}") + ".svg"


def tables_of_model(
    runs: list[Run], study: Study, stored: Bootstraps, beside: list[Run]
) -> list[str]:
    """Return the tables and the plot of a study with one model.

    Args:
        runs: of the study.
        study: how it is shown.
        stored: bootstrap intervals.
        beside: runs of the study beside it.
    """
    details, commands = details_table(runs), "\n\n".join(provenance([run.row for run in runs]))
    majority = None
    if study.majority:
        majority = {run.task: stored.majority(run.task, run.metric) for run in runs}
    return [
        peers_table([*runs, *beside]) if study.beside else "",
        scores_table(runs, majority),
        f"![Metric against megabytes](results/{plot_name(runs)})",
        goals_table(runs, study),
        comparisons_table(runs, study, stored),
        f'<details markdown="1"><summary>All values and commands</summary>\n\n{details}\n\n'
        f"{commands}\n\n</details>",
    ]


def section(
    study: Study,
    runs: list[Run],
    baselines: list[dict],
    stored: Bootstraps,
    beside: Sequence[Run] = (),
) -> str:
    """Return the section of a study; empty without rows.

    Args:
        study: how it is shown.
        runs: of all models.
        baselines: rows of the training of float32 models.
        stored: bootstrap intervals.
        beside: runs of the study beside it.
    """
    parts = [f"## {study.title}", study.text]
    if study.split != "dev":
        parts.append("Scores are those on the held-out training examples.")
    if baselines:
        parts += [
            "The float32 models, and the settings that were tried:",
            baselines_table(baselines),
            *provenance(baselines),
        ]
    models = grouped(runs, "model")
    for model, own in models.items():
        if baselines or len(models) > 1:
            parts.append(f"The compressed models ({model}):")
        parts += tables_of_model(own, study, stored, same_model(beside, model))
    return "\n\n".join(filter(None, parts)) if runs or baselines else ""


def same_model(runs: Sequence[Run], model: str) -> list[Run]:
    """Return the runs of a model."""
    return [run for run in runs if run.model == model]


def files(root: Path, data_dir: str | None = None) -> dict[Path, str]:
    """Return the content of every generated file.

    Args:
        root: folder of the repository.
        data_dir: folder of the GLUE tasks, for intervals that are not stored.
    """
    rows = grouped(read_rows(root / RESULTS, STUDIES), lambda row: row["key"]["study"])
    runs = {name: runs_of(rows.get(name, []), study.split) for name, study in STUDIES.items()}
    baselines = {name: [row for row in own if is_baseline(row)] for name, own in rows.items()}
    baselines["glue"] = read_lines(str(root / RESULTS / "glue_float32.jsonl"))
    stored = Bootstraps(root / RESULTS / "quality_intervals.json", data_dir)
    sections = [
        section(study, runs[name], baselines.get(name, []), stored, runs.get(study.beside, ()))
        for name, study in STUDIES.items()
    ]
    readme = readme_table(runs["glue"], STUDIES["glue"])
    content = {
        root / PAGE: fill(
            (root / PAGE).read_text(), {"studies": "\n\n".join(filter(None, sections))}
        ),
    }
    blocks = {"glue": readme, "first screen": first_screen.box(root / RESULTS, runs)}
    content[root / README] = fill((root / README).read_text(), blocks)
    for name, text in first_screen.pictures(runs).items():
        content[root / PLOTS / name] = text
    for name, study in STUDIES.items():
        for model, own in grouped(runs[name], "model").items():
            beside = same_model(runs.get(study.beside, ()), model)
            content[root / PLOTS / plot_name(own)] = pareto_svg([*beside, *own])
    ablations = runs_of(read_rows(root / RESULTS, [ablation_page.STUDY]))
    content[root / ABLATIONS] = fill(
        (root / ABLATIONS).read_text(), ablation_page.sections(ablations)
    )
    for name, text in ablation_page.plots(ablations).items():
        content[root / PLOTS / name] = text
    if stored.used:
        content[stored.path] = stored.text()
    return content


def main(argv: list[str] | None = None) -> None:
    """Write or check all files; ``argv`` defaults to the command line."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data_dir", help="Folder with one folder per GLUE task.")
    parser.add_argument("--check", action="store_true", help="Only compare.")
    args = parser.parse_args(argv)
    for path, text in files(ROOT, args.data_dir).items():
        if path.is_file() and path.read_text() == text:
            continue
        if args.check:
            sys.exit(f"{path.relative_to(ROOT)} is out of date; run benchmarks/quality/report.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
