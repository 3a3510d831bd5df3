"""Plots of a compression run and of a model's size: what they show, and that it can be read."""

import itertools
import re
import sys

import matplotlib.style
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from support.stacked import make_stacked

from hf_quantnoise import IPQConfig, quantize_model, size_report
from hf_quantnoise.compression.reporting.plots import (
    plot_compression,
    plot_layers,
    plot_sizes,
    plot_stages,
)
from hf_quantnoise.size import SizeReport, SizeRow

CONFIG = IPQConfig(block_size=4, n_centroids=16, kmeans_iter=1)
METRICS = {"eval_loss": 0.31, "eval_accuracy": 0.91, "eval_accuracy_mm": 0.9, "eval_f1": 0.9,
           "eval_a_metric_with_a_name_that_is_too_long": 0.5, "eval_runtime": 3.0}  # fmt: skip


def report_of(n_layers, hidden, prefix="bert.encoder.layer"):
    """Return the report of a model with 6 weights, a norm and a sentinel in each layer."""
    shape, n_bytes = (hidden, hidden), 4 * hidden**2
    tables = ["embeddings.words", "embeddings.positions"]
    names = [f"{prefix}.{i}.attention.self.projection_{j}" for i in range(n_layers) for j in "qkvo"]
    names += [f"{prefix}.{i}.{name}.dense" for i in range(n_layers) for name in ("inner", "output")]
    rows = [
        SizeRow(f"{name}.weight", group, "pq 256x8", shape, n, n, n, n_bytes)
        for name in tables + names
        for group, n in [("embeddings" if name in tables else "ffn", 4096 + n_bytes // 31)]
    ]
    rows.append(SizeRow("head.weight", "head", f"tied to {tables[0]}.weight", shape, 0, 0, 0, 0))
    for i in range(n_layers):
        rows.append(SizeRow(f"{prefix}.{i}.norm", "other", "float32", (64,), 256, 256, 256, 256))
        rows.append(SizeRow(f"{prefix}.{i}.qn", "other", "sentinel", (1,), 1, 1, 0, 0))
    return SizeReport(rows, 1000)


def history_of(report, stages, metrics=METRICS):
    """Return a history whose file and metrics shrink by equal steps."""
    first, last = report.total.dense_bytes / 1e6, report.total.disk_bytes / 1e6
    names = [r.name.removesuffix(".weight") for r in report.rows if r.stored.startswith("pq")]
    history = []
    for number, stage in enumerate(["dense", *stages]):
        done = number / len(stages)
        packed = {name: value * (1 - 0.1 * done) for name, value in metrics.items()}
        history.append({
            "stage": stage, "mb": first * (last / first) ** done, "relative_error": done / 10,
            "metric": {name: value * (1 - 0.02 * done) for name, value in metrics.items()},
            "packed_metric": packed if number else {},
            "layer_errors": {name: 0.1 + i % 7 / 30 for i, name in enumerate(names)}
            if number == 1 else {},
        })  # fmt: skip
    return history


MODELS = {
    "2 layers": (report_of(2, 32), ["ffn", "embeddings", "attention"]),
    "6 layers": (report_of(6, 384), ["ffn", "embeddings", "attention"]),
    "long names": (
        report_of(32, 1024, "a_very_long_name_of_a_model.language_model.transformer_blocks"),
        [r"decoder\.layers\.[0-9]+\.(self_attn|encoder_attn)\.(q|k|v)_proj", *"abcdefgh"],
    ),
}


def visible_texts(figure):
    """Return (text, extent in pixels) of everything that is written."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    artists = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for axes in figure.axes:
        if axes.get_visible():
            labels = [axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels()]
            if axes.yaxis.get_tick_params()["labelleft"]:
                labels += axes.get_yticklabels()
            low, high = axes.get_window_extent(renderer).intervalx
            ticks = {id(text) for text in axes.get_xticklabels()}
            artists += axes.texts
            for text in labels:
                center = sum(text.get_window_extent(renderer).intervalx) / 2
                if id(text) not in ticks or low - 1 <= center <= high + 1:  # others are not drawn
                    artists.append(text)
    if figure._suptitle is not None and figure._suptitle not in artists:
        artists.append(figure._suptitle)
    return [(text.get_text(), text.get_window_extent(renderer)) for text in artists
            if text.get_text()]  # fmt: skip


@pytest.mark.parametrize("style", ["default", "dark_background"])
@pytest.mark.parametrize("name", MODELS)
def test_texts_of_plots_do_not_overlap_and_are_inside(name, style):
    report, stages = MODELS[name]
    with matplotlib.style.context(style):
        histories = [history_of(report, stages, metrics) for metrics in (METRICS, {})]
        figures = [plot_stages(history, report) for history in histories]
        figures.append(plot_layers(history_of(report, stages), report))
        figures += [plot_sizes(report, per, "out/compressed") for per in ("group", "layer")]
    for figure in figures:
        texts, page = visible_texts(figure), figure.bbox
        assert len(texts) > 8
        assert "float32" in [text for text, _ in texts]
        assert not any("sentinel" in text for text, _ in texts)
        for text, box in texts:
            assert page.x0 <= box.x0 and box.x1 <= page.x1 + 1, text
            assert page.y0 <= box.y0 and box.y1 <= page.y1 + 1, text
            assert box.height * 800 / figure.bbox.width >= 7, text  # pixels in 800
        for (one, first), (other, second) in itertools.combinations(texts, 2):
            assert not first.overlaps(second), (one, other)


def test_repeated_layers_share_rows_in_plots_of_large_models():
    for report, n_rows in ((MODELS["6 layers"][0], 38), (MODELS["long names"][0], 8)):
        (axes,) = plot_sizes(report, "layer", "x").axes
        names = [text.get_text() for text in axes.get_yticklabels()]
        assert len(names) == n_rows + 1 and names[-1].endswith("other tensors")
        stored = axes.collections[-1].get_offsets()
        rows = [row for row in report.rows if row.group != "other" and row.disk_bytes]
        sums = sum(row.disk_bytes for row in report.rows if row.stored == "float32")
        assert sorted(x for x, _ in stored) == sorted([*(row.disk_bytes for row in rows), sums])
    assert sum("*" in name for name in names) == 6
    texts = [text.get_text() for text in axes.texts]
    assert any(re.fullmatch(r"32 x pq 256x8, 30\.\dx smaller", text) for text in texts)


def test_plot_compression_shows_history_and_sizes_of_a_model(tmp_path):
    model = make_stacked("bert", 2)
    dense = size_report(model)
    quantize_model(model, CONFIG, progress=False)
    report = size_report(model)
    plan = model.config.quantization_config
    packed = [name for name in plan.plan if name not in plan.left_dense]
    history = history_of(report, ["ffn"])
    history[1]["layer_errors"] = {name: 0.1 + i / 100 for i, name in enumerate(packed)}
    stages, layers = plot_stages(history, report), plot_layers(history, report)
    sizes, loss = stages.axes[0].get_lines(), stages.axes[1].get_lines()
    assert list(sizes[0].get_xdata()) == [1e6 * record["mb"] for record in history]
    assert sizes[1].get_xdata() == [dense.total.disk_bytes - dense.header_bytes] * 2
    assert loss[0].get_xdata() == [history[0]["metric"]["eval_loss"]] * 2  # the line
    assert loss[1].get_xdata() == [history[1]["packed_metric"]["eval_loss"]]
    assert list(loss[2].get_xdata()) == [record["metric"]["eval_loss"] for record in history]
    names = [text.get_text() for text in layers.axes[0].get_yticklabels()]
    assert set(names) == set(packed)
    shown = layers.axes[0].collections[0].get_offsets()
    assert [x for x, _ in shown] == [history[1]["layer_errors"][name] for name in names]
    stored = layers.axes[1].collections[-1].get_offsets()
    for name, (size, _) in zip(names, stored, strict=True):
        layer = model.get_submodule(name)
        tensors = [layer.weight_indices, layer.weight_codebook.half()]
        assert size == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    paths = plot_compression(history, report, str(tmp_path / "plots"))
    assert [path.rpartition("/")[2] for path in paths] == ["stages.png", "layers.png"]
    for path in paths:
        with Image.open(path) as image:
            assert image.width == 960 and len(image.convert("RGB").getcolors(10**6)) > 10


def test_plot_compression_without_metrics(tmp_path):
    model = quantize_model(make_stacked("bert", 2), CONFIG, progress=False)
    record = {"stage": "ffn", "mb": 1.0, "metric": {}, "packed_metric": {}, "relative_error": 0.3,
              "layer_errors": {}}  # fmt: skip
    paths = plot_compression([record], size_report(model), str(tmp_path))
    assert len(paths) == 2


def test_plot_compression_without_matplotlib_warns(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report = size_report(torch.nn.Linear(2, 2))
    monkeypatch.setattr("hf_quantnoise.compression.reporting.plots.logger.propagate", True)
    logger = "hf_quantnoise.compression.reporting.plots"
    history = history_of(MODELS["2 layers"][0], ["ffn"])
    with caplog.at_level("WARNING", logger=logger):
        assert plot_compression(history, report, str(tmp_path / "plots")) == []
    assert "pip install" in caplog.text and not (tmp_path / "plots").exists()
