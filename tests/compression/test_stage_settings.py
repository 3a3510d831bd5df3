"""Stages with their own length and learning rates."""

import pytest
from support.stacked import make_stacked
from support.trainers import make_trainer
from transformers import HfArgumentParser, TrainerCallback

from hf_quantnoise import CompressionArguments, IPQConfig
from hf_quantnoise.compression.training.stage_trainer import StageTrainer

CONFIG = IPQConfig(block_size=4, n_centroids=16)


class Watch(TrainerCallback):
    """Records the learning rates at each step, and the size of the optimizer's first state."""

    def __init__(self):
        self.rates, self.states = [], []

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append([])
        self.states.append(len(optimizer.state))

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.rates[-1].append([group["lr"] for group in optimizer.param_groups])


@pytest.fixture
def compress(tmp_path, parity_data, monkeypatch):
    """Return a function that compresses a model and returns what was recorded."""

    def run(**fields):
        watch, real = Watch(), StageTrainer.__init__

        def init(self, *args, **kwargs):
            real(self, *args, **kwargs)
            self.add_callback(watch)

        monkeypatch.setattr(StageTrainer, "__init__", init)
        trainer = make_trainer(tmp_path, make_stacked("bert", 2), parity_data)
        trainer.compress(CONFIG, CompressionArguments(**fields))
        return watch

    return run


def test_each_stage_has_its_own_length_rates_and_optimizer(compress):
    settings = {
        "embeddings": {"steps": 2, "learning_rate": 5e-4},
        "attention": {"epochs": 1 / 3, "codebook_learning_rate": 1e-2},
    }
    watch = compress(stage_steps=4, stage_learning_rate=2e-3, stage_settings=settings)
    assert [len(steps) for steps in watch.rates] == [4, 2, 2]
    first = [steps[0] for steps in watch.rates]
    assert set(first[0]) == {2e-3}
    assert set(first[1]) == {5e-4}
    assert set(first[2]) == {2e-3, 1e-2}
    # Each stage has its own linear schedule.
    assert [steps[0] for steps in watch.rates[0]] == pytest.approx([2e-3, 1.5e-3, 1e-3, 5e-4])
    assert watch.states == [0, 0, 0]


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"stage_steps": -1}, "stage_steps.*-1"),
        ({"stage_settings": "ffn=2"}, "stage_settings.*'ffn=2'"),
        ({"stage_settings": {"ffn": 2}}, "stage_settings.*{'ffn': 2}"),
        ({"stage_settings": {"ffn": {"epoch": 2}}}, "stage_settings.*'epoch'"),
        ({"stage_settings": {"ffn": {"learning_rate": 0}}}, "stage_settings.*learning_rate.*0"),
    ],
)
def test_invalid_settings_are_named(fields, match):
    with pytest.raises(ValueError, match=match):
        CompressionArguments(**fields)


def test_settings_of_an_unknown_stage_are_refused(compress):
    with pytest.raises(ValueError, match=r"stage_settings.*'fnn'"):
        compress(stage_settings={"fnn": {"epochs": 1}})


def test_settings_are_read_from_the_command_line():
    flags = ["--stage_settings", '{"attention": {"epochs": 2}}', "--stage_steps", "7"]
    (args,) = HfArgumentParser(CompressionArguments).parse_args_into_dataclasses(flags)
    assert args.settings_of("attention").epochs == 2
    assert args.settings_of("attention").steps is None
    assert args.settings_of("ffn").steps == 7
