"""Stages with a length and a learning rate of their own."""

import pytest
from support.stacked import make_stacked
from transformers import HfArgumentParser, TrainerCallback, TrainingArguments

from hf_quantnoise import CompressionArguments, IPQConfig, QuantNoiseTrainer
from hf_quantnoise.compression.training.stage_trainer import StageTrainer

CONFIG = IPQConfig(block_size=4, n_centroids=16)


class Watch(TrainerCallback):
    """Learning rates at each step, and the length of the optimizer's state at each start."""

    def __init__(self):
        self.rates, self.states = [], []

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append([])
        self.states.append(len(optimizer.state))

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.rates[-1].append([group["lr"] for group in optimizer.param_groups])


@pytest.fixture
def watched(tmp_path, parity_data, monkeypatch):
    def run(**fields):
        watch, real = Watch(), StageTrainer.__init__

        def init(self, *args, **kwargs):
            real(self, *args, **kwargs)
            self.add_callback(watch)

        monkeypatch.setattr(StageTrainer, "__init__", init)
        args = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=16, learning_rate=1e-3, report_to="none",
            save_strategy="no", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        model = make_stacked("bert", 2)
        trainer = QuantNoiseTrainer(model, args, None, train_dataset=parity_data)
        trainer.compress(CONFIG, CompressionArguments(**fields))
        return watch

    return run


def test_each_stage_has_its_own_length_and_rates(watched):
    settings = {
        "embeddings": {"steps": 2, "learning_rate": 5e-4},
        "attention": {"epochs": 1 / 3, "codebook_learning_rate": 1e-2},
    }
    watch = watched(stage_steps=4, stage_learning_rate=2e-3, stage_settings=settings)
    assert [len(steps) for steps in watch.rates] == [4, 2, 2]
    first = [steps[0] for steps in watch.rates]
    assert set(first[0]) == {2e-3} and set(first[1]) == {5e-4}
    assert set(first[2]) == {2e-3, 1e-2}
    # Each falls in a straight line of its own.
    assert [steps[0] for steps in watch.rates[0]] == pytest.approx([2e-3, 1.5e-3, 1e-3, 5e-4])


def test_each_stage_has_a_new_optimizer(watched):
    assert watched(stage_steps=2).states == [0, 0, 0]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"stage_steps": -1}, "stage_steps=-1"),
        ({"stage_settings": "ffn=2"}, "stage_settings='ffn=2'"),
        ({"stage_settings": {"ffn": 2}}, "stage_settings={'ffn': 2}"),
        ({"stage_settings": {"ffn": {"epoch": 2}}}, "'ffn'.*'epoch'.*did you mean 'epochs'"),
        ({"stage_settings": {"ffn": {"learning_rate": 0}}}, "learning_rate=0.*above 0"),
    ],
)
def test_bad_settings_are_named(fields, words):
    with pytest.raises(ValueError, match=words):
        CompressionArguments(**fields)


def test_settings_of_an_unknown_stage_are_refused_before_training(watched):
    with pytest.raises(ValueError, match="stage_settings.*'fnn'"):
        watched(stage_settings={"fnn": {"epochs": 1}})


def test_settings_from_the_command_line():
    words = ["--stage_settings", '{"attention": {"epochs": 2}}', "--stage_steps", "7"]
    (args,) = HfArgumentParser(CompressionArguments).parse_args_into_dataclasses(words)
    assert args.of_stage("attention").epochs == 2 and args.of_stage("attention").steps is None
    assert args.of_stage("ffn").steps == 7
