"""The page of performance: parts of a run, bars, plots and tables from rows."""

import re
import time
from types import SimpleNamespace

import bars
import pages
import performance
import pytest
from timed import timed


def test_page_and_plots_belong_to_the_rows():
    """If this fails, run benchmarks/performance.py."""
    for path, text in performance.files(performance.ROOT).items():
        assert path.is_file() and path.read_text() == text, path.relative_to(performance.ROOT)


def test_topics_without_rows_say_that_they_are_not_measured(tmp_path):
    page = tmp_path / performance.PAGE
    page.parent.mkdir(parents=True)
    names = [name for name, topic in performance.TOPICS.items() if topic.table]
    page.write_text("".join(f"<!-- report: {n} -->\n<!-- end of report -->\n" for n in names))
    assert list(performance.files(tmp_path)) == [page]
    text = performance.files(tmp_path)[page]
    assert text.count("Not measured yet.") == len(names)
    assert pages.fill(text, {names[0]: "x"}).count("Not measured yet.") == len(names) - 1


def test_timed_counts_nested_functions_once():
    def outer():
        time.sleep(0.03)
        owner.inner()
        owner.inner()

    owner = SimpleNamespace(outer=outer, inner=lambda: time.sleep(0.02))
    start = time.perf_counter()
    with timed({"a": [(owner, "outer")], "b": [(owner, "inner")], "c": []}) as seconds:
        owner.outer()
    spent = time.perf_counter() - start
    assert seconds["a"] >= 0.03 and seconds["b"] >= 0.04 and seconds["c"] == 0
    assert sum(seconds.values()) <= spent
    before = dict(seconds)
    owner.inner()  # the context has ended
    assert seconds == before


def test_timed_restores_functions_that_raise():
    def fail():
        raise KeyError("x")

    owner = SimpleNamespace(fail=fail)
    with pytest.raises(KeyError), timed({"a": [(owner, "fail")]}) as seconds:
        owner.fail()
    assert owner.fail is fail and seconds["a"] > 0


def test_bars_are_proportional_to_their_values():
    groups = {"first": [bars.Bar("a<b", 2.0, 1.0, 3.0, goal=2.5)], "": [bars.Bar("c", -1.0)]}
    text = bars.bars_svg(groups, "{:+.1f}", line=1.0, title="seconds")
    widths = [float(w) for w in re.findall(r'<rect x="[\d.]+" y="[\d.]+" width="([\d.]+)"', text)]
    assert widths[0] == pytest.approx(2 * widths[1], abs=0.2)
    assert "a&lt;b" in text and ">+2.0<" in text and ">-1.0<" in text and ">first<" in text
    assert text.count("stroke-dasharray") == 1 and text.count("#d55e00") == 1


def test_plots_show_the_rows():
    row = {"key": {"noise": "proxy", "setting": "base"}, "quartiles": [1.01, 1.02, 1.03]}
    assert ">+2.0<" in performance.noise_plot([row])
    scaling = [
        {"key": {"part": "scaling", "varied": "n_blocks", "n_blocks": n, "threads": 1},
         "wall": n / 2**18}
        for n in (2**16, 2**17, 2**18)
    ]  # fmt: skip
    plot = performance.scaling_plot(scaling)
    assert "exponent 1.00" in plot and ">1 thread<" in plot and "stroke-dasharray" not in plot
    assert performance.kmeans_plot(scaling) == ""  # no row of the comparison
    shot = {"key": {"threads": 2}, "seconds": 5.0, "peak": 3e9, "dense": 2e9, "parameters": 5e8}
    assert "goal: 1 GiB" in performance.one_shot_plot([shot, {**shot, "parameters": 1e9}])
    parts = {"plain": {"k-means": 0.0, "steps": 10.0},
             "compression": {"k-means": 5.0, "steps": 11.0}}  # fmt: skip
    plot = performance.compression_plot([parts])
    assert ">+50.0<" in plot and ">+10.0<" in plot
