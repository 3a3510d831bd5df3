"""The first screen of the README: what a user gains and pays, and a picture, from rows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from pareto import Panel, Point, svg
from results_file import read_lines
from rows import METRICS, Run, grouped
from tables import arms, average, mean_and_spread, percent, task_title, tasks_of

TASK, MODEL = "sst2", "minilm"
BATCH_SIZE = 32  # of the GLUE study (glue_compress.py)
ONE_SHOT_SHAPE = "roberta-base"  # of the rows of one_shot.py
PICTURES = ("first_screen-light.svg", "first_screen-dark.svg")
# Light color -> dark one.
DARK = {
    "#ffffff": "#0d1117",
    "#222222": "#e6edf3",
    "#444444": "#9198a1",
    "#dddddd": "#3d444d",
    "#0072b2": "#58a6ff",
    "#000000": "#f0f6fc",
    "#8a6d00": "#d29922",
    "#7f3c8d": "#bc8cff",
}
# Models of the language-model study, smallest first -> millions of parameters.
_LLAMAS = {"stories": "0.26 M", "llama": "5.1 M"}
_LIBRARIES = {"torchao (Linear, embeddings)": "torchao", "quanto (Linear)": "quanto"}
# Methods with noise -> those without that are as long. Of each size, the one with the most runs of
# both is shown, and of these the first.
_WITH_NOISE = {
    "noise, bits allocated": ("no noise, bits allocated",),
    "noise": ("no noise",),
    "trained noise": ("no noise", "joint, no noise"),
}
# Methods of the studies -> name in the picture. Others are not shown there.
_SHOWN = {
    "noise, bits allocated": "noise",
    "no noise, bits allocated": "no noise",
    "noise": "noise",
    "trained noise": "noise",
    "no noise": "no noise",
    "joint, no noise": "no noise",
    "one shot": "one shot, no training",
    "intN after training": "int4, no training",
    "torchao (Linear, embeddings)": "torchao int2, int4, no training",
    "quanto (Linear)": "quanto int4, no training",
}


def _scores(runs: list[Run], name: str = "value") -> str:
    metric = METRICS[runs[0].metric]
    values = [getattr(run, name) for run in runs]
    if name == "start":  # each seed has one float32 model, or all have the same
        values = list({run.seed: run.start for run in runs}.values())
        values = values if len(set(values)) > 1 else values[:1]
    return mean_and_spread(values, metric.show)


def _megabytes(runs: list[Run]) -> float:
    return statistics.mean(run.megabytes for run in runs)


def _smaller(runs: list[Run]) -> str:
    return f"{statistics.mean(run.times_smaller for run in runs):.1f}x"


def _shown(runs: Iterable[Run]) -> list[Run]:
    """Return the runs without other methods with noise, and their counterparts, of each size."""
    shown = []
    for same_size in grouped(runs, "size").values():
        methods = grouped(same_size, "method")
        noise = [name for name in _WITH_NOISE if name in methods]
        pairs = {
            name: sum(len(methods.get(other, ())) for other in _WITH_NOISE[name]) for name in noise
        }
        best = max(
            noise,
            key=lambda name: (min(pairs[name], len(methods[name])), len(methods[name])),
            default=None,
        )
        others = {part for name in noise if name != best for part in (name, *_WITH_NOISE[name])}
        kept = {best, *_WITH_NOISE.get(best, ())}
        shown += [run for run in same_size if run.method in kept or run.method not in others]
    return shown


def _best(runs: list[Run]) -> list[list[Run]]:
    """Return the runs of each size to show: those with noise if there are any."""
    return [arm for arm in arms(_shown(runs)) if arm[0].method in _WITH_NOISE] or arms(runs)


def _minutes(runs: list[Run]) -> str:
    low, high = (round(f(run.minutes for run in runs)) for f in (min, max))
    return f"{low} to {high} minutes" if low < high else f"{low} minutes"


def _with_counterparts(runs: list[Run], scores: Callable[[list[Run]], str]) -> str:
    """Return the scores at each size, beside those without noise after as many steps."""
    texts = []
    for arm in _best(runs):
        without = [r for r in runs if r.method in _WITH_NOISE.get(arm[0].method, ())]
        without = [r for r in without if (r.size, r.steps) in {(r.size, r.steps) for r in arm}]
        other = f", {scores(without)} without noise" if without else ""
        texts.append(f"{scores(arm)} at {_smaller(arm)}{other}")
    return "; ".join(texts)


def _average(glue: list[Run]) -> str:
    """Return the average over the tasks of GLUE, at the sizes that have all of them."""
    tasks = tasks_of(glue)
    sizes = grouped(glue, lambda run: (run.method, run.size))
    complete = [run for runs in sizes.values() if tasks_of(runs) == tasks for run in runs]
    scores = _with_counterparts(
        complete, lambda runs: mean_and_spread(average(runs, lambda run: run.kept), percent)
    )
    names = ", ".join(task_title(task) for task in tasks)
    return f"MiniLM, average over {names} in % of float32: {scores}" if scores else ""


def _accuracy(shown: Mapping[str, list[Run]]) -> list[str]:
    """Return a line for each title: the scores at each size, with noise and without."""
    return [
        f"{title}: {_with_counterparts(runs, _scores)} (float32 {_scores(runs, 'start')})"
        for title, runs in shown.items()
        if runs
    ]


def _time(sst2: list[Run], one_shot: list[dict]) -> str:
    best = _best(sst2)
    steps = " or ".join(f"{n:,}" for n in sorted({run.steps for arm in best for run in arm}))
    text = "; ".join(f"{_minutes(arm)} at {_smaller(arm)}" for arm in best)
    shape = next(line for line in one_shot if line["key"]["shape"] == ONE_SHOT_SHAPE)
    return (
        f"MiniLM on SST-2, one CPU core, {steps} steps of {BATCH_SIZE} sentences after the "
        f"finetuning: {text}. The recipes `20x` and `30x` train two and three times as long as the "
        f"finetuning. Without training, in one shot: {shape['seconds']:.0f} s for the shape of "
        f"RoBERTa-base, on {shape['key']['threads']} cores."
    )


def _speed(lines: list[dict]) -> str:
    def variants(tokens: str) -> dict:
        found = [line for line in lines if line["key"]["case"] == f"MiniLM, {tokens} tokens"]
        return next(line["variants"] for line in found if line["key"]["threads"] == 1)

    short, long = variants("1x16"), variants("1x128")
    packed, extra, fast, torch = (
        [f"{v[name]['speed']:.1f}" for v in (short, long)]
        + [f"{short[name]['bytes'] / 1e6:.0f} MB"]
        for name in ("packed", "packed, cpu extra", 'optimized, "int8"', "torch dynamic int8")
    )
    return (
        f"MiniLM, one CPU thread, times the speed of float32, for 16 / 128 tokens: as loaded "
        f"{extra[0]} / {extra[1]} with `hf-quantnoise[cpu]` and {packed[0]} / {packed[1]} without, "
        f"with {packed[2]} in memory; after "
        f'`optimize_for_inference(model, "int8")` {fast[0]} / {fast[1]} with {fast[2]}; torch\'s '
        f"dynamic int8 {torch[0]} / {torch[1]} with {torch[2]}; float32 has "
        f"{short['dense float32']['bytes'] / 1e6:.0f} MB."
    )


def _peers(peers: list[Run]) -> str:
    """Compare the averages of what was run on all tasks, with the bytes that were computed."""
    runs = [run for run in peers if run.model == MODEL]
    tasks, texts = tasks_of(runs), []
    for arm in sorted(grouped(runs, "arm").values(), key=_megabytes):
        if tasks_of(arm) != tasks:
            continue
        library = _LIBRARIES.get(arm[0].method, "this package")
        name = "one shot" if arm[0].method == "one shot" else arm[0].size
        kept = mean_and_spread(average(arm, lambda run: run.kept), percent)
        size = f"{_megabytes(arm):.1f} MB"
        file = statistics.mean(run.row["file_bytes"] for run in arm) / 1e6
        if file > 1.01 * _megabytes(arm):
            size += f" if it were packed (its file: {file:.1f})"
        texts.append(f"{library}, {name}: {kept} with {size}")
    names = ", ".join(task_title(task) for task in tasks)
    return (
        f"MiniLM, all without training, average over {names} in % of float32, one seed: "
        f"{'; '.join(texts)}."
    )


def box(results: Path, runs: Mapping[str, list[Run]]) -> str:
    """Return the table of the first screen.

    Args:
        results: folder of the rows.
        runs: study -> its runs.
    """
    glue, peers = runs["glue"], runs["glue_peers"]
    sst2 = [run for run in glue if run.task == TASK]
    first = _best(sst2)[0]
    shown = {
        "MiniLM, SST-2, accuracy": sst2,
        **{
            f"Llama of {size} parameters, WikiText-2, perplexity": text
            for size, text in _llamas(runs).items()
        },
        "MobileNetV1, CIFAR-10, accuracy": runs["images"],
    }
    costs = filter(None, [_average(glue), *_accuracy(shown)])
    lines = [
        (
            "You gain",
            f"A file of {_megabytes(first):.1f} MB in place of "
            f"{first[0].row['float32_bytes'] / 1e6:.1f} (MiniLM).",
        ),
        ("It costs accuracy", ".<br>".join(costs) + "."),
        ("How long?", _time(sst2, read_lines(str(results / "one_shot.jsonl")))),
        ("How fast?", _speed(read_lines(str(results / "speed.jsonl")))),
        ("How does it compare?", _peers(peers)),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| **{name}** | {text} |" for name, text in lines)])


def _llamas(runs: Mapping[str, list[Run]]) -> dict[str, list[Run]]:
    """Return the size of each language model -> its runs."""
    models = grouped(runs["language_model"], "model")
    return {size: models[name] for name, size in _LLAMAS.items() if name in models}


def _points(runs: Iterable[Run], difference: bool) -> list[Point]:
    points = []
    shown = [run for run in runs if run.method in _SHOWN]
    for arm in grouped(shown, "arm").values():
        factor = METRICS[arm[0].metric].factor
        values = [factor * (run.value - difference * run.start) for run in arm]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        name = _SHOWN[arm[0].method]
        points.append(Point(name, _megabytes(arm), statistics.mean(values), spread))
    return points


def pictures(runs: Mapping[str, list[Run]]) -> dict[str, str]:
    """Return file name -> plot, for light and dark pages."""
    sst2 = [*runs["glue"], *runs["glue_peers"]]
    sst2 = [run for run in sst2 if (run.task, run.model) == (TASK, MODEL)]
    dense = Point("float32 model", sst2[0].row["float32_bytes"] / 1e6, 0.0, 0.0)
    points = [dense, *_points(_shown(sst2), difference=True)]
    shown = [Panel("SST-2, MiniLM: accuracy - float32", points, 0.0)]
    for name, rows in _llamas(runs).items():
        trained = [run for run in rows if run.method != "one shot"]
        points = _points(trained, difference=False)
        if len({run.size for run in trained}) > 1:  # one size makes no curve
            start = statistics.mean(run.start for run in trained)
            shown.append(Panel(f"WikiText-2, Llama {name}: perplexity", points, start))
    methods = ["float32 model", *dict.fromkeys(_SHOWN.values())]
    methods = [m for m in methods if any(p.method == m for panel in shown for p in panel.points)]
    light = svg(shown, methods)
    dark = light
    for color, other in DARK.items():
        dark = dark.replace(color, other)
    return dict(zip(PICTURES, (light, dark), strict=True))
