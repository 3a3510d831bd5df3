"""Logs, progress bars and plots of a compression run."""

import copy
import functools
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from support import trainers
from support.stacked import make_stacked
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from hf_quantnoise import (
    CompressionArguments,
    FixedPointConfig,
    IPQConfig,
    QuantNoiseConfig,
    quantize_model,
    size_report,
)
from hf_quantnoise.compression.reporting.plots import plot_compression
from hf_quantnoise.compression.reporting.record import codebook_use
from hf_quantnoise.modeling import packed_layers

CONFIG = IPQConfig(block_size=4, n_centroids=16)
FFN = {"block_size": 4, "n_centroids": 16, "stages": ["ffn"]}


class Listener(TrainerCallback):
    """Records each log with its step, as TensorBoard or trackio would."""

    def __init__(self):
        self.lines = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.lines.append((state.global_step, dict(logs)))


def trainer_and_listener(folder, data, noise=None, **changes):
    listener, settings = Listener(), {"logging_steps": 2, **changes}
    parts = {"callbacks": [listener], "eval_dataset": data}
    model = make_stacked("bert", 2)
    trainer = trainers.make_trainer(folder, model, data, noise, parts=parts, **settings)
    return trainer, listener


@pytest.fixture
def make_trainer(tmp_path, parity_data):
    return functools.partial(trainer_and_listener, tmp_path, parity_data)


@pytest.fixture(scope="module")
def run(tmp_path_factory, parity_data):
    """A training run and a compression run, with all logs and plots."""
    folder, figures = tmp_path_factory.mktemp("run"), []
    trainer, listener = trainer_and_listener(folder, parity_data, report_to=["tensorboard"])
    trainer.train()
    trained = len(listener.lines)
    original = Figure.savefig

    def savefig(figure, path, **kwargs):
        figures.append(figure)
        original(figure, path, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        trainer.compress(CONFIG)
    return SimpleNamespace(
        trainer=trainer, folder=folder, figures=figures, all_lines=listener.lines,
        lines=listener.lines[trained:],
    )  # fmt: skip


def packed_by_stages(model):
    """Return the names of packed layers, without leftovers."""
    config = model.config.quantization_config
    return config.plan.keys() - config.left_dense.keys()


def test_compress_logs_every_metric(run):
    names = {name for _, logs in run.lines for name in logs}
    expected = ["loss", "learning_rate", "eval_loss", "packed_loss", "clean_loss",
                "teacher_logits", "mb", "relative_error", "codebook_use", "stage"]  # fmt: skip
    assert {f"compression_{name}" for name in expected} <= names
    errors = {name.partition("/")[2] for name in names if name.startswith("compression_error/")}
    assert errors == packed_by_stages(run.trainer.model) and len(errors) == 14
    # TensorBoard skips everything else, other loggers raise.
    assert {type(value) for _, logs in run.lines for value in logs.values()} <= {int, float}
    steps = [step for step, _ in run.lines]
    assert steps == sorted(steps) and steps[0] == 6  # after those of the training
    assert steps[-1] == 6 + 3 * 6
    sizes = values_of(run.lines, "compression_mb")
    assert sizes == [record["mb"] for record in run.trainer.compression_history]
    assert run.trainer.state.log_history[-1]["compression_stage"] == 3


def test_layer_errors_are_logged_before_finetuning(run):
    name = "compression_error/bert.encoder.layer.1.output.dense"
    names = [set(logs) for _, logs in run.lines]
    errors = [index for index, logged in enumerate(names) if name in logged]
    trained = [index for index, logged in enumerate(names) if "compression_train_loss" in logged]
    assert len(errors) == 1 and len(trained) == 3 and errors[0] < trained[0]


def test_tensorboard_shows_training_and_compression_as_one_run(run):
    folders = {path.parent for path in run.folder.rglob("events.out.tfevents.*")}
    assert len(folders) == 1
    events = EventAccumulator(str(folders.pop()), size_guidance={"scalars": 0}).Reload()
    logged = {}
    for step, logs in run.all_lines:
        for name, value in logs.items():
            logged.setdefault(name, []).append((step, value))
    written = {}
    for tag in events.Tags()["scalars"]:
        name = re.sub("^train/", "", tag).replace("eval/", "eval_", 1)
        written[name] = [(event.step, event.value) for event in events.Scalars(tag)]
    assert logged.keys() == written.keys() and "compression_mb" in logged
    for name, scalars in written.items():
        steps, values = zip(*sorted(scalars), strict=True)
        expected = list(zip(*sorted(logged[name]), strict=True))
        assert list(steps) == list(expected[0])
        assert list(values) == pytest.approx(list(expected[1]), rel=1e-6)


def values_of(lines, name):
    return [logs[name] for _, logs in lines if name in logs]


def test_metrics_of_dense_packed_and_finetuned_model_are_logged(make_trainer, parity_data):
    trainer, listener = make_trainer()
    dense = trainer.evaluate()["eval_loss"]
    packed = quantize_model(copy.deepcopy(trainer.model), IPQConfig(**FFN), progress=False)
    inputs = {name: torch.tensor(parity_data[name]) for name in ("input_ids", "labels")}
    with torch.no_grad():
        expected = float(packed(**inputs).loss)
    before = len(listener.lines)
    trainer.compress(IPQConfig(**FFN))
    lines = listener.lines[before:]
    assert values_of(lines, "compression_clean_loss") == [dense] * 2
    assert values_of(lines, "compression_packed_loss") == [pytest.approx(expected, rel=1e-5)]
    record = trainer.compression_history[-1]
    assert values_of(lines, "compression_eval_loss") == [dense, record["metric"]["eval_loss"]]
    assert record["packed_metric"]["eval_loss"] == values_of(lines, "compression_packed_loss")[0]
    assert record["metric"]["eval_loss"] != record["packed_metric"]["eval_loss"]


def test_evaluation_after_packing_does_not_change_the_result(make_trainer):
    models = []
    for evaluated in (True, False):
        trainer, _ = make_trainer()
        trainer.model.dropout.p = 0.3  # so that the state of the generator matters
        if not evaluated:
            trainer.eval_dataset = None
        models.append(trainer.compress(IPQConfig(**FFN)).state_dict())
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())


# ---- bars ----------------------------------------------------------------------------------------


def bars(text, name):
    """Return (done, total, time left) as shown by the bars with a name."""
    shown = re.findall(rf"{name}: .*? (\d+)/(\d+) \[\d+:\d+<([\d:?]+)", text)
    return [(int(done), int(total), left) for done, total, left in shown]


def test_progress_bars_show_stages_layers_and_steps(make_trainer, capsys):
    trainer, _ = make_trainer(disable_tqdm=False)
    trainer.compress(CONFIG, CompressionArguments(stage_steps=2))
    text = capsys.readouterr().err
    stages = bars(text, "stages")
    assert {(done, total) for done, total, _ in stages} == {(0, 3), (1, 3), (2, 3), (3, 3)}
    assert stages[0][2] == "?" and all(left != "?" for done, _, left in stages if done)
    assert re.search(r"stages: .*1/3 \[.*embeddings", text)  # the current stage
    for stage, layers in (("ffn", 4), ("embeddings", 2), ("attention", 8)):
        assert bars(text, f"quantize {stage}")[0][:2] == (0, layers)
    assert text.count("2/2 [") >= 3  # the optimizer steps of each stage, by Trainer


def test_progress_bars_are_off_with_disable_tqdm_and_on_other_ranks(
    make_trainer, capsys, monkeypatch
):
    target = IPQConfig(target_size_mb=0.05, codebook_bits=16, kmeans_iter=2)
    trainer, _ = make_trainer(disable_tqdm=True)
    trainer.compress(target, CompressionArguments(stage_steps=1))
    shown = capsys.readouterr()
    assert "it/s" not in shown.err and "[00:" not in shown.err
    assert "total file size" in shown.out  # the table is not a progress bar
    trainer, _ = make_trainer(disable_tqdm=False)
    monkeypatch.setattr(type(trainer), "is_world_process_zero", lambda self: False)
    trainer.compress(CONFIG, CompressionArguments(stage_epochs=0))
    err = capsys.readouterr().err
    assert not bars(err, "stages") and "quantize" not in err


def test_logs_are_printed_once_and_plots_can_be_disabled(make_trainer, tmp_path, capsys):
    trainer, _ = make_trainer()
    trainer.compress(CONFIG, CompressionArguments(plots=False))
    printed = [line for line in capsys.readouterr().out.splitlines() if "_loss'" in line]
    assert len(printed) == len(set(printed)) > 3
    assert not (tmp_path / "plots").exists()


def test_noise_rates_are_logged_in_training(make_trainer):
    noise = QuantNoiseConfig(noise=["pq", "int8"], p=[0.1, 0.4], block_size=4, n_centroids=16)
    trainer, listener = make_trainer(noise)
    # These have too few blocks for a codebook, so they get int8 noise only.
    small = ("token_type", "classifier")
    in_blocks, alone = (
        sum(
            parameter.numel()
            for name, parameter in trainer.model.named_parameters()
            if parameter.dim() == 2 and any(word in name for word in small) == is_small
        )
        for is_small in (False, True)
    )
    noised = (1 - 0.9 * 0.6) * in_blocks + 0.4 * alone
    trainer.train()
    logs = next(logs for _, logs in listener.lines if "loss" in logs)
    assert (logs["noise_p_0"], logs["noise_p_1"]) == (0.1, 0.4)
    everything = sum(parameter.numel() for parameter in trainer.model.parameters())
    assert logs["noised_share"] == pytest.approx(noised / everything)


def test_codebook_use_counts_each_codebook_once():
    model = quantize_model(make_stacked("gpt2", 2), CONFIG, progress=False)
    used, total = 0, 0
    for name, layer in packed_layers(model):
        if name != "lm_head":  # tied to the table
            used += len(set(layer.codes().flatten().tolist()))
            total += 16
    assert codebook_use(model) == pytest.approx(used / total)
    two = IPQConfig(block_size=4, n_centroids=16, n_codebooks=2)
    assert 0 < codebook_use(quantize_model(make_stacked("gpt2", 2), two, progress=False)) <= 1
    intn = quantize_model(make_stacked("gpt2", 2), FixedPointConfig(bits=4), progress=False)
    assert codebook_use(intn) is None


def test_compress_writes_plots(run):
    for name in ("stages.png", "layers.png"):
        with Image.open(run.folder / "plots" / name) as image:
            assert image.width > 300 and len(image.convert("RGB").getcolors(10**6)) > 10


def test_plots_show_the_history_and_the_size_on_disk(run):
    (stages, layers), small = run.figures, run.trainer.model
    history = run.trainer.compression_history
    finetuned, packed = stages.axes[0].get_lines()
    assert list(finetuned.get_xdata()) == [record["mb"] for record in history]
    assert list(finetuned.get_ydata()) == [record["metric"]["eval_loss"] for record in history]
    losses = [record["packed_metric"]["eval_loss"] for record in history[1:]]
    assert list(packed.get_ydata()) == losses
    names = [label.get_text() for label in layers.axes[0].get_yticklabels()]
    assert set(names) == packed_by_stages(small)
    errors, sizes = ([bar.get_width() for bar in axes.patches] for axes in layers.axes)
    recorded = {name: e for record in history for name, e in record["layer_errors"].items()}
    assert errors == [recorded[name] for name in names]
    for name, size in zip(names, sizes, strict=True):
        layer = small.get_submodule(name)
        tensors = [layer.weight_indices, layer.weight_codebook.half()]
        expected = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        assert expected <= 1e3 * size <= expected + 1  # a sentinel takes a byte


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
    with caplog.at_level("WARNING", logger=logger):
        assert plot_compression([], report, str(tmp_path / "plots")) == []
    assert not (tmp_path / "plots").exists()
