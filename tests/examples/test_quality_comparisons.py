"""Paired tests and intervals of the quality studies, against scipy, sklearn and known answers."""

import math

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("sklearn")

from comparisons import Bootstraps, comparisons_table
from published import STUDIES
from rows import runs_of
from scipy.stats import ttest_rel
from significance import bootstrap_mean, bootstrap_metric, mcnemar, over_seeds
from sklearn.metrics import f1_score, matthews_corrcoef
from support.quality_rows import cells, digits, row


@pytest.fixture
def stored(tmp_path):
    return Bootstraps(tmp_path / "quality_intervals.json")


def test_mcnemar_is_the_exact_binomial_test():
    one, other = np.array([1] * 12 + [0] * 3 + [1] * 20, bool), np.array([0] * 12 + [1] * 23, bool)
    first, second, p = mcnemar(one, other)
    assert (first, second) == (12, 3)
    tail = sum(math.comb(15, k) for k in range(4)) / 2**15
    assert p == pytest.approx(2 * tail)
    assert mcnemar(one, one) == (0, 0, 1.0)


@pytest.mark.parametrize(
    ("name", "score"), [("f1", f1_score), ("matthews_correlation", matthews_corrcoef)]
)
def test_bootstrap_metric_matches_resampling_with_sklearn(name, score):
    draws = np.random.default_rng(1)
    labels = draws.integers(0, 2, 200)
    flip = [draws.random((2, 200)) < rate for rate in (0.2, 0.3)]
    one, other = (np.where(f, 1 - labels, labels) for f in flip)
    interval = bootstrap_metric(name, one, other, labels)

    def difference(rows):
        pairs = zip(one, other, strict=True)
        return np.mean(
            [score(labels[rows], a[rows]) - score(labels[rows], b[rows]) for a, b in pairs]
        )

    assert interval.mean == pytest.approx(difference(np.arange(200)))
    samples = [difference(draws.integers(0, 200, 200)) for _ in range(300)]
    assert np.percentile(samples, [2.5, 97.5]) == pytest.approx(
        [interval.low, interval.high], abs=0.03
    )


def test_bootstrap_mean_draws_an_example_with_all_its_seeds():
    """Equal seeds add no evidence, so the interval is that of one seed."""
    values = np.random.default_rng(0).normal(0.1, 1, (1, 300))
    one, three = (
        bootstrap_mean(values, 0 * values),
        bootstrap_mean(values.repeat(3, 0), np.zeros((3, 300))),
    )
    assert three.low == pytest.approx(one.low) and three.high == pytest.approx(one.high)
    half = 1.96 * values.std() / math.sqrt(300)
    assert (one.high - one.low) / 2 == pytest.approx(half, rel=0.1)


def test_over_seeds_gives_standard_error_and_t_test():
    mean, error, p = over_seeds([0.01, 0.02, 0.03])
    assert mean == pytest.approx(0.02) and error == pytest.approx(0.01 / math.sqrt(3))
    # For two degrees of freedom, P(|T| > t) = 1 - t / sqrt(2 + t^2).
    t = mean / error
    assert p == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert math.isnan(over_seeds([0.1])[2])


def test_better_needs_the_test(stored):
    rows = []
    for seed in (1, 2, 3):
        rows += [
            row("no noise", "sst2", seed, digits(200, 150)),
            row("noise", "sst2", seed, digits(200, 170)),
            row("no noise", "rte", seed, digits(200, 150)),
            row("noise", "rte", seed, digits(200, 151)),
        ]
    table = comparisons_table(runs_of(rows), STUDIES["glue"], stored)
    better, alike = cells(table, "SST-2"), cells(table, "RTE")
    assert better[-1] == "better" and better[3] == "+10.0 ± 0.0"
    assert better[5] == f"{2 * 0.5**60:.3g} (60 to 0)"
    assert alike[-1] == "no difference shown" and alike[3] == "+0.5 ± 0.0"
    average = cells(table, "average % of float32 (ahead on 2 of 2)")
    assert average[3] == f"+{100 * (0.1 + 0.005) / 2 / 0.8:.1f} ± 0.0"
    assert stored.used and not stored.stored


def test_different_steps_are_not_compared(stored):
    rows = [row("no noise", "sst2", 1, digits(200, 100), steps=100)]
    rows.append(row("noise", "sst2", 1, digits(200, 200), steps=200))
    assert not comparisons_table(runs_of(rows), STUDIES["glue"], stored)
    for method in ("no noise", "noise"):
        rows += [row(method, task, 1, digits(200, 100)) for task in ("cola", "rte")]
    table = comparisons_table(runs_of(rows), STUDIES["glue"], stored)
    assert "SST-2" not in table
    assert cells(table, "average % of float32 (ahead on 0 of 2)")[3] == "+0.0"


def test_divergences_are_compared_over_tasks_and_seeds(stored):
    values = {"no noise": [0.1, 0.2, 0.4, 0.3], "noise": [0.09, 0.17, 0.37, 0.31]}
    places = [(task, seed) for task in ("sst2", "rte") for seed in (1, 2)]
    rows = [
        row(
            method,
            task,
            seed,
            digits(100, 60),
            dev={"accuracy": 0.6, "divergence": value},
            held_out={"accuracy": 0.6, "divergence": 1 - value},
        )
        for method in values
        for (task, seed), value in zip(places, values[method], strict=True)
    ]
    table = comparisons_table(runs_of(rows), STUDIES["glue"], stored)
    found = cells(table, "divergence (lower in 3 of 4 runs)")
    test = ttest_rel(*(np.log(values[method]) for method in ("noise", "no noise")))
    low, high = (100 * (math.exp(x) - 1) for x in test.confidence_interval(0.95))
    ratio = math.prod(a / b for a, b in zip(values["noise"], values["no noise"], strict=True))
    assert found[3:] == [
        f"{100 * (ratio**0.25 - 1):+.1f}%",
        f"{low:+.1f}% to {high:+.1f}%",
        f"{test.pvalue:.3g} (t test, 4 runs)",
        "no difference shown",
    ]
    assert cells(table, "divergence on held-out examples (lower in 1 of 4 runs)")


def test_references_are_compared_in_their_order(stored):
    """Whatever the order of the rows, the difference is noise - no noise."""
    methods = ("noise, bits allocated", "no noise, bits allocated")
    rows = [row(method, "sst2", 1, digits(100, 60)) for method in methods]
    assert " - ".join(methods) in comparisons_table(runs_of(rows), STUDIES["glue"], stored)


def test_only_common_seeds_are_compared(stored):
    rows = [row("no noise", "sst2", seed, digits(100, 60)) for seed in (1, 2)]
    rows += [row("noise", "sst2", seed, digits(100, 20 * seed)) for seed in (2, 3)]
    table = comparisons_table(runs_of(rows), STUDIES["glue"], stored)
    assert cells(table, "SST-2")[3] == "-20.0" and cells(table, "SST-2")[-1] == "worse"


def test_language_models_are_compared_by_losses(stored):
    def line(method, loss, value):
        made = row(method, "wikitext2", 1, "", metric="perplexity")
        made["key"]["study"] = "language_model"
        made["dev"] = {"perplexity": value, "loss": loss}
        made["dev_losses"] = [loss + 0.1 * math.sin(i) for i in range(50)]
        return made

    lines = runs_of([line("staged, no noise", 2.0, 7.4), line("pq noise", 1.9, 6.7)])
    found = cells(comparisons_table(lines, STUDIES["language_model"], stored), "WikiText-2")
    assert found[3:] == ["-0.70", "-0.1000 to -0.1000 nats", "", "better"]


def test_f1_needs_labels_once(stored, tmp_path):
    pandas = pytest.importorskip("pandas")
    labels = [0, 1] * 50
    right = {"no noise": digits(100, 60), "noise": digits(100, 90, 5)}
    lines = []
    for method, correct in right.items():
        line = row(method, "mrpc", 1, correct, metric="f1")
        predictions = [y if c == "1" else 1 - y for y, c in zip(labels, correct, strict=True)]
        line["dev"]["f1"] = f1_score(labels, predictions)
        lines.append(line)
    with pytest.raises(ValueError, match=r"mrpc.*--data_dir"):
        comparisons_table(runs_of(lines), STUDIES["glue"], stored)
    (tmp_path / "mrpc").mkdir()
    pandas.DataFrame({"label": labels}).to_parquet(tmp_path / "mrpc" / "dev.parquet")
    first = Bootstraps(stored.path, str(tmp_path))
    table = comparisons_table(runs_of(lines), STUDIES["glue"], first)
    assert cells(table, "MRPC")[-1] == "better"
    (kept,) = first.used.values()
    assert kept["mean"] == pytest.approx(lines[1]["dev"]["f1"] - lines[0]["dev"]["f1"])
    stored.path.write_text(first.text())
    assert comparisons_table(runs_of(lines), STUDIES["glue"], Bootstraps(stored.path)) == table
