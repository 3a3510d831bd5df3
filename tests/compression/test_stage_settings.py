"""Stages with a length and a learning rate of their own; one schedule over all of them."""

import pytest
import torch
from support.stacked import make_stacked
from transformers import HfArgumentParser, TrainerCallback, TrainingArguments

from hf_quantnoise import CompressionArguments, IPQConfig, QuantNoiseTrainer
from hf_quantnoise.compression.training.stage_trainer import StageTrainer

CONFIG = IPQConfig(block_size=4, n_centroids=16)


class Watch(TrainerCallback):
    """Learning rates at each step, and the optimizer's moments at the beginning of each run."""

    def __init__(self):
        self.rates, self.begun, self.ended = [], [], []

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.rates.append([])
        self.begun.append(_moments(model, optimizer))

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.rates[-1].append([group["lr"] for group in optimizer.param_groups])

    def on_train_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.ended.append(_moments(model, optimizer))


def _moments(model, optimizer):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: state["exp_avg"].clone() for p, state in optimizer.state.items()}


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


def test_by_default_a_stage_begins_with_nothing_of_the_one_before(watched):
    assert [len(moments) for moments in watched(stage_steps=2).begun] == [0, 0, 0]


def test_one_schedule_over_all_stages_with_the_optimizer_of_what_stays(watched):
    watch = watched(stage_steps=4, stage_schedule="continue")
    rates = [step[0] for steps in watch.rates for step in steps]
    assert rates == pytest.approx([1e-3 * (12 - step) / 12 for step in range(12)])
    for number in (1, 2):
        begun, ended = watch.begun[number], watch.ended[number - 1]
        assert begun.keys() < ended.keys()  # what was packed in between is gone
        assert any("LayerNorm" in name for name in begun)
        assert all(torch.equal(begun[name], ended[name]) for name in begun)
        gone = ended.keys() - begun.keys()
        assert all(name.endswith(".weight") for name in gone)


def test_one_schedule_divides_by_epochs_too(watched):
    settings = {"ffn": {"epochs": 1.0}, "embeddings": {"epochs": 0.5}, "attention": {"epochs": 0.5}}
    watch = watched(stage_settings=settings, stage_schedule="continue")
    assert [len(steps) for steps in watch.rates] == [6, 3, 3]
    rates = [step[0] for steps in watch.rates for step in steps]
    assert rates == pytest.approx([1e-3 * (12 - step) / 12 for step in range(12)])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"stage_steps": -1}, "stage_steps=-1 must be 0 or more"),
        ({"stage_schedule": "cosine"}, "stage_schedule='cosine' must be one of 'restart', 'cont"),
        ({"stage_settings": "ffn=2"}, "stage_settings=.*must be a dict, or JSON"),
        ({"stage_settings": {"ffn": 2}}, "must be a dict, or JSON"),
        ({"stage_settings": {"ffn": {"epoch": 2}}}, "'epoch' .of stage 'ffn'. is unknown; known"),
        ({"stage_settings": {"ffn": {"learning_rate": 0}}}, "learning_rate=0 .* above 0"),
    ],
)
def test_bad_settings_are_named(fields, words):
    with pytest.raises(ValueError, match=words):
        CompressionArguments(**fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"stage_settings": {"fnn": {"epochs": 1}}}, "names the stage 'fnn'; the config's stages"),
        (
            {"stage_settings": {"ffn": {"steps": 1}}, "stage_schedule": "continue"},
            "all of them in epochs, or of all in steps",
        ),
    ],
)
def test_settings_of_other_stages_are_refused_before_anything_is_done(watched, fields, words):
    with pytest.raises(ValueError, match=words):
        watched(**fields)


def test_settings_from_the_command_line():
    words = ["--stage_settings", '{"attention": {"epochs": 2}}', "--stage_steps", "7"]
    (args,) = HfArgumentParser(CompressionArguments).parse_args_into_dataclasses(words)
    assert args.of_stage("attention").epochs == 2 and args.of_stage("attention").steps is None
    assert args.of_stage("ffn").steps == 7
