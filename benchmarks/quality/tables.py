"""Tables of the results page, in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

from published import Study
from rows import METRICS, TASKS, Run, by_seed, grouped

OWN = "hf_quantnoise"  # the library of rows that name none
README_TEXT = """\
GLUE tasks with MiniLM (22.7 M parameters), trained with and without noise in the same number of
steps, stored, loaded and scored on the dev sets; {of}. A dash is not measured.
A [recipe](docs/how_to/recipes.md) trains longer at these sizes, has the learning rate of the
finetuning (here 1e-4, on CoLA 5e-5; these runs have 5e-5) and does not replace tokens at random
(these runs do on CoLA, MRPC and RTE: `--random_tokens 0.5`).
[Results](docs/reference/results.md) has all methods, tests and plots.
"""


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; empty if it has no rows."""
    rows = list(rows)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""


def mean_and_spread(values: Sequence[float], show: Callable[[float], str]) -> str:
    """Return the mean, with the sample standard deviation if there are several values."""
    spread = f" ± {show(statistics.stdev(values))}" if len(values) > 1 else ""
    return show(statistics.mean(values)) + spread


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def average(runs: Iterable[Run], value: Callable[[Run], float]) -> list[float]:
    """Return, for each seed with every task, the mean of a value over the tasks."""
    return [statistics.mean(map(value, rows.values())) for rows in by_seed(runs).values()]


def times(value: float) -> str:
    return f"{value:.1f}x"


def task_title(task: str) -> str:
    return TASKS.get(task, task)


def column_title(task: str, runs: list[Run]) -> str:
    """Return a task's name and metric."""
    metric = next(run.metric for run in runs if run.task == task)
    return f"{task_title(task)} ({METRICS[metric].title})"


def tasks_of(runs: Iterable[Run]) -> list[str]:
    """Return the tasks of runs, those of GLUE in their usual order."""
    order = list(TASKS)
    tasks = dict.fromkeys(run.task for run in runs)
    return sorted(tasks, key=lambda task: order.index(task) if task in order else len(order))


def size_order(size: str | None) -> tuple:
    """Return the key to sort sizes by: "13x" before "20x", other names after these."""
    is_factor = size is not None and size.endswith("x") and size[:-1].isdigit()
    return (0, int(size[:-1]), "") if is_factor else (1, 0, size or "")


def arms(runs: Iterable[Run]) -> list[list[Run]]:
    """Return the runs of each size and method, smaller factors first."""
    return sorted(grouped(runs, "arm").values(), key=lambda rows: size_order(rows[0].size))


def float32_starts(runs: Iterable[Run], task: str) -> dict[tuple, float]:
    """Return (seed, metric of float32) once for each start of a task."""
    return {(run.seed, run.start): run.start for run in runs if run.task == task}


def _score(values: Iterable[float], runs: Iterable[Run], task: str) -> str:
    """Return mean and spread of values of a task's metric."""
    metric = next(run.metric for run in runs if run.task == task)
    return mean_and_spread(list(values), METRICS[metric].show)


def _task_cell(arm: list[Run], task: str, with_share: bool = True) -> str:
    rows = [run for run in arm if run.task == task]
    if not rows:
        return "-"
    share = f" ({percent(statistics.mean(run.kept for run in rows))}%)" if with_share else ""
    return _score([run.value for run in rows], rows, task) + share


def _majority_row(runs: list[Run], majority: dict[str, float]) -> list[str]:
    """Return the row of the scores of always predicting the most frequent class."""
    cells, shares = [], []
    for task in tasks_of(runs):
        shares.append(majority[task] / statistics.mean(float32_starts(runs, task).values()))
        cells.append(f"{_score([majority[task]], runs, task)} ({percent(shares[-1])}%)")
    return ["", "majority class", "", *cells, percent(statistics.mean(shares)), "", "", ""]


def _complete_average(arm: list[Run], tasks: list[str]) -> list[float]:
    """Return the average share of float32 by seed; empty if a task is missing."""
    return average(arm, lambda run: run.kept) if tasks_of(arm) == tasks else []


def scores_table(runs: list[Run], majority: dict[str, float] | None = None) -> str:
    """Return metric and share of float32 by size, method and task.

    Args:
        runs: of one model.
        majority: task -> score of always predicting the most frequent class.
    """
    tasks = tasks_of(runs)
    cells = [_score(float32_starts(runs, task).values(), runs, task) for task in tasks]
    dense = statistics.mean(run.row["float32_bytes"] for run in runs) / 1e6
    rows = [["", "float32", "", *cells, "100", f"{dense:.2f}", "1.0x", ""]]
    if majority is not None:
        rows.append(_majority_row(runs, majority))
    for arm in arms(runs):
        kept = _complete_average(arm, tasks)
        rows.append(
            [
                arm[0].size or "",
                arm[0].method,
                str(len(by_seed(arm))),
                *(_task_cell(arm, task) for task in tasks),
                mean_and_spread(kept, percent) if kept else "-",
                f"{statistics.mean(run.megabytes for run in arm):.2f}",
                times(statistics.mean(run.times_smaller for run in arm)),
                f"{sum(run.minutes for run in arm) / max(len({r.seed for r in arm}), 1):.1f}",
            ]
        )
    titles = [column_title(task, runs) for task in tasks]
    mean = "% of float32" if len(tasks) == 1 else "average % of float32"
    header = ["size", "method", "seeds", *titles, mean, "MB", "smaller", "minutes"]
    return markdown(header, rows)


def goals_table(runs: list[Run], study: Study) -> str:
    """Return which methods reach the goal of their size."""
    rows = []
    for arm in arms(runs):
        goal = study.goals.get(arm[0].size or "")
        values = average(arm, goal.value) if goal else []
        if values:
            found = len(tasks_of(arm))
            verdict = f"not judged: {found} of {study.n_tasks} tasks"
            if found == study.n_tasks:
                verdict = goal.verdict(statistics.mean(values))
            cells = (arm[0].method, mean_and_spread(values, percent), verdict)
            rows.append([arm[0].size or "", goal.text, *cells])
    return markdown(["size", "goal of the mean over tasks and seeds", "method", "%", ""], rows)


def peers_table(runs: list[Run]) -> str:
    """Return the models of other libraries, beside the best ones of this package in their size.

    Args:
        runs: of this package and of others, with one model.
    """
    every = list(grouped(runs, "arm").values())
    rows = []
    for peer in sorted(every, key=_megabytes, reverse=True):
        if _is_own(peer):
            continue
        own = [arm for arm in every if _is_own(arm) and _megabytes(arm) <= _megabytes(peer)]
        kept = average(peer, lambda run: run.kept)
        rows.append(
            [
                peer[0].method,
                peer[0].size or "",
                f"{_megabytes(peer):.2f}",
                f"{statistics.mean(run.row['file_bytes'] for run in peer) / 1e6:.2f}",
                f"{len(tasks_of(peer))} x {len(kept)}",
                mean_and_spread(kept, percent) if kept else "-",
                *_best_beside(peer, [arm for arm in own if not arm[0].steps]),
                *_best_beside(peer, [arm for arm in own if arm[0].steps]),
            ]
        )
    header = ["library", "weights", "MB", "MB of its file", "tasks x seeds", "average % of float32"]
    return markdown([*header, "best one shot", "points", "best trained", "points"], rows)


def _is_own(arm: list[Run]) -> bool:
    return arm[0].row["key"]["setting"].get("library", OWN) == OWN


def _megabytes(arm: list[Run]) -> float:
    return statistics.mean(run.megabytes for run in arm)


def _best_beside(peer: list[Run], own: list[list[Run]]) -> tuple[str, str]:
    """Return the arm that is best on the tasks of a peer, and its lead over the same seeds."""
    tasks, found = set(tasks_of(peer)), []
    for arm in own:
        sides = [by_seed(run for run in side if run.task in tasks) for side in (arm, peer)]
        leads = [
            statistics.mean(one.kept - sides[1][seed][task].kept for task, one in runs.items())
            for seed, runs in sides[0].items()
            if seed in sides[1] and runs.keys() == tasks
        ]
        if leads:
            found.append((statistics.mean(leads), leads, arm))
    if not found:
        return "-", ""
    _, leads, best = max(found, key=lambda entry: entry[0])
    lead = mean_and_spread(leads, percent)
    name = ", ".join(filter(None, [best[0].method, best[0].size]))
    return f"{name}, {_megabytes(best):.2f} MB", lead


def details_table(runs: list[Run]) -> str:
    """Return every measured value by size, method and task: means over seeds."""
    rows = []
    for arm in arms(runs):
        for task in tasks_of(arm):
            rows.append(_details([run for run in arm if run.task == task]))
    measures = ["loss", "divergence", "agreement", "MB", "steps", "minutes"]
    header = ["size", "method", "task", "by seed", "float32", "held-out", *measures]
    return markdown(header, rows)


def _details(rows: list[Run]) -> list[str]:
    rows = sorted(rows, key=lambda run: run.seed)
    show = METRICS[rows[0].metric].show

    def mean(name: str, form: Callable[[float], str], part: str = rows[0].split) -> str:
        values = [run.row[part][name] for run in rows if name in run.row.get(part, {})]
        return form(statistics.mean(values)) if values else ""

    return [
        rows[0].size or "",
        rows[0].method,
        task_title(rows[0].task),
        ", ".join(f"{run.seed}: {show(run.value)}" for run in rows),
        " / ".join(show(run.start) for run in rows),
        mean(rows[0].metric, show, "held_out"),
        mean("loss", "{:.3f}".format),
        mean("divergence", "{:.4f}".format),
        mean("agreement", percent),
        f"{statistics.mean(run.megabytes for run in rows):.3f}",
        " / ".join(f"{steps:,}" for steps in sorted({run.steps for run in rows})),
        f"{statistics.mean(run.minutes for run in rows):.1f}",
    ]


def baselines_table(lines: list[dict]) -> str:
    """Return the settings of the float32 models that were tried, with both metrics."""
    groups: dict[tuple, list[dict]] = {}
    for line in lines:
        key = dict(line["key"])
        settings = key.get("setting") or {n: key[n] for n in ("learning_rate", "epochs")}
        words = [f"{name.replace('_', ' ')} {value}" for name, value in settings.items()]
        _, _, variant = key.get("method", "").partition(", ")  # "float32, ..."
        text = ", ".join(filter(None, [*words, variant]))
        groups.setdefault((key.get("model", ""), key["task"], text), []).append(line)
    rows = []
    for (model, task, setting), tried in groups.items():
        metric = next(name for name in tried[0]["held_out"] if name in METRICS)

        def cell(split: str, name: str, form, tried=tried) -> str:
            values = [line[split][name] for line in tried if split in line]
            return mean_and_spread(values, form) if values else ""

        forms = ((metric, METRICS[metric].show), ("loss", "{:.3f}".format))
        cells = (cell(split, *form) for split in ("held_out", "dev") for form in forms)
        seeds = ", ".join(str(line["key"]["seed"]) for line in tried)
        minutes = f"{statistics.mean(line['seconds'] for line in tried) / 60:.1f}"
        rows.append([model, task_title(task), setting, seeds, *cells, minutes])
    header = ["model", "task", "setting", "seeds", "held-out", "its loss", "dev", "its loss"]
    return markdown([*header, "minutes"], rows)


def readme_table(runs: list[Run], study: Study) -> str:
    """Return the README's text and table: the main methods of a study.

    Empty without rows of the first of them.
    """
    shown = (run for run in runs if run.method in study.main)
    runs = sorted(shown, key=lambda run: study.main.index(run.method))
    if study.main[0] not in [run.method for run in runs]:
        return ""
    tasks = tasks_of(runs)
    cells = [_score(float32_starts(runs, task).values(), runs, task) for task in tasks]
    dense = statistics.mean(run.row["float32_bytes"] for run in runs) / 1e6
    rows = [["float32", f"{dense:.1f} MB", *cells, ""]]
    for arm in arms(runs):
        cells = [_task_cell(arm, task, with_share=False) for task in tasks]
        smaller = times(statistics.mean(run.times_smaller for run in arm))
        size = f"{statistics.mean(run.megabytes for run in arm):.1f} MB"
        kept = _complete_average(arm, tasks)
        share = mean_and_spread(kept, percent) if kept else "-"
        rows.append([f"{smaller} smaller, {arm[0].method}", size, *cells, share])
    header = ["model", "size", *(column_title(task, runs) for task in tasks), "% of float32"]
    seeds = sorted({run.seed for run in runs})
    names = ", ".join(map(str, seeds))
    of = f"seed {names}" if len(seeds) == 1 else f"mean and standard deviation over seeds {names}"
    return f"{README_TEXT.format(of=of)}\n{markdown(header, rows)}"
