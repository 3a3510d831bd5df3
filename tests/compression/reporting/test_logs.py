"""Logs, progress bars and history of a compression run."""

import copy
import functools
import json
import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
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
)
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
    folder = tmp_path_factory.mktemp("run")
    trainer, listener = trainer_and_listener(folder, parity_data, report_to=["tensorboard"])
    trainer.train()
    trained = len(listener.lines)
    trainer.compress(CONFIG)
    return SimpleNamespace(
        trainer=trainer, folder=folder, all_lines=listener.lines, lines=listener.lines[trained:]
    )


def test_compress_logs_every_metric(run):
    names = {name for _, logs in run.lines for name in logs}
    expected = ["loss", "learning_rate", "eval_loss", "packed_loss", "dense_loss",
                "teacher_logits", "mb", "relative_error", "codebook_use", "stage",
                "layer_error_median", "layer_error_max"]  # fmt: skip
    assert {f"compression/{name}" for name in expected} <= names
    assert len(names) < 50  # however many layers the model has
    # TensorBoard skips everything else, other loggers raise.
    assert {type(value) for _, logs in run.lines for value in logs.values()} <= {int, float}
    steps = [step for step, _ in run.lines]
    assert steps == sorted(steps) and steps[0] == 6  # after those of the training
    assert steps[-1] == 6 + 3 * 6
    sizes = values_of(run.lines, "compression/mb")
    assert sizes == [record["mb"] for record in run.trainer.compression_history]
    plots = sorted(path.name for path in (run.folder / "plots").iterdir())
    assert plots == ["layers.png", "stages.png"]
    assert run.trainer.state.log_history[-1]["compression/stage"] == 3


def test_layer_errors_are_logged_before_finetuning(run):
    names = [set(logs) for _, logs in run.lines]
    errors = [i for i, logged in enumerate(names) if "compression/layer_error_max" in logged]
    trained = [i for i, logged in enumerate(names) if "compression/train_loss" in logged]
    assert len(errors) == len(trained) == 3
    assert all(error < end for error, end in zip(errors, trained, strict=True))


def test_layer_errors_are_a_histogram_in_tensorboard(run):
    (folder,) = {path.parent for path in run.folder.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder), size_guidance={"histograms": 0}).Reload()
    histograms = events.Histograms("train/compression/layer_errors")
    records = run.trainer.compression_history[1:]
    assert [event.step for event in histograms] == [6, 12, 18]  # when a stage is packed
    for event, record in zip(histograms, records, strict=True):
        errors = list(record["layer_errors"].values())
        shown = event.histogram_value
        assert shown.num == len(errors)
        assert [shown.min, shown.max] == pytest.approx([min(errors), max(errors)])
        assert shown.sum == pytest.approx(sum(errors))


def test_layer_errors_are_a_histogram_in_wandb(make_trainer, monkeypatch):
    logged = []
    wandb = SimpleNamespace(Histogram=lambda values: ("histogram", values), log=logged.append)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    trainer, _ = make_trainer()
    trainer.add_callback(type("WandbCallback", (TrainerCallback,), {})())
    trainer.compress(IPQConfig(**FFN), CompressionArguments(stage_epochs=0))
    errors = list(trainer.compression_history[-1]["layer_errors"].values())
    name = "train/compression/layer_errors"
    assert logged == [{name: ("histogram", errors), "train/global_step": 0}]


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
    assert logged.keys() == written.keys() and "compression/mb" in logged
    for name, scalars in written.items():
        steps, values = zip(*sorted(scalars), strict=True)
        expected = list(zip(*sorted(logged[name]), strict=True))
        assert list(steps) == list(expected[0])
        assert list(values) == pytest.approx(list(expected[1]), rel=1e-6)


def test_history_is_a_list_with_a_table_and_a_data_frame(run):
    history = run.trainer.compression_history
    assert isinstance(history, list) and json.loads(json.dumps(history)) == list(history)
    frame = history.to_pandas()
    assert list(frame["stage"]) == ["dense", "ffn", "embeddings", "attention"]
    for column, field, name in (
        ("metric.eval_loss", "metric", "eval_loss"),
        ("packed_metric.eval_loss", "packed_metric", "eval_loss"),
        ("finetuning.train_loss", "finetuning", "train_loss"),
    ):
        found = [record[field].get(name, math.nan) for record in history]
        assert list(frame[column])[1:] == found[1:]
    assert list(frame["layer_errors"]) == [record["layer_errors"] for record in history]
    html = history._repr_html_()
    assert html.count("<tr>") == 1 + len(history)
    assert all(f">{record['stage']}<" in html for record in history)


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
    assert values_of(lines, "compression/dense_loss") == [dense] * 2
    assert values_of(lines, "compression/packed_loss") == [pytest.approx(expected, rel=1e-5)]
    record = trainer.compression_history[-1]
    assert values_of(lines, "compression/eval_loss") == [dense, record["metric"]["eval_loss"]]
    assert record["packed_metric"]["eval_loss"] == values_of(lines, "compression/packed_loss")[0]
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
    stages = {"ffn": 4, "embeddings": 2, "attention": 8}
    for number, (stage, layers) in enumerate(stages.items(), 1):
        assert bars(text, f"quantize {stage}")[0][:2] == (0, layers)
        done, total, left = bars(text, rf"finetune {stage} \({number}/3\)")[-1]
        assert (done, total) == (2, 2) and left != "?"
        assert bars(text, rf"evaluate {stage} \({number}/3\)")[0][1] == 12
    assert "evaluate before compression" in text


def test_one_progress_bar_at_a_time(make_trainer, capsys):
    target = IPQConfig(target_size_mb=0.05, codebook_bits=16, kmeans_iter=2)
    trainer, _ = make_trainer(disable_tqdm=False, save_strategy="epoch")
    trainer.compress(target, CompressionArguments(stage_steps=1))
    shown = capsys.readouterr()
    assert "quantize" in shown.err and "finetune" in shown.err
    assert "Writing model shards" not in shown.err
    assert "\x1b[A" not in shown.err  # moves the cursor up to a bar above another one
    assert max(map(len, (shown.out + shown.err).replace("\r", "\n").splitlines())) < 400


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_nothing_is_shown_if_the_log_level_is_error(make_trainer, capsys, disable_tqdm):
    target = IPQConfig(target_size_mb=0.05, codebook_bits=16, kmeans_iter=2)
    try:
        trainer, listener = make_trainer(disable_tqdm=disable_tqdm, log_level="error")
        trainer.train()
        trainer.compress(target, CompressionArguments(stage_steps=1))
    finally:
        transformers.logging.set_verbosity_warning()  # Trainer has set it
    assert capsys.readouterr() == ("", "")
    assert len(listener.lines) > 6  # reporters get all figures


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
    assert not bars(err, "finetune") and "quantize" not in err


def test_logs_are_printed_once_and_plots_can_be_disabled(make_trainer, tmp_path, capsys):
    trainer, _ = make_trainer()
    trainer.compress(CONFIG, CompressionArguments(plots=False))
    lines = capsys.readouterr().out.splitlines()
    printed = [line for line in lines if "loss'" in line]
    assert len(printed) == len(set(printed)) > 3
    assert max(map(len, lines)) < 400  # and not one with a figure for each layer
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
