"""A pass under bf16 autocast: nothing of it is left on the model, and a killed one goes on."""

from functools import wraps

import pytest
import torch
from support.stacked import make_stacked
from support.stage_runs import Killed, compare, make_pass_trainer, spoilt

from hf_quantnoise import AutoQuantizedModel, CompressionArguments, IPQConfig
from hf_quantnoise.compression.distillation.teacher import Teacher
from hf_quantnoise.compression.training.packed_trainer import undo_accelerate_prepare
from hf_quantnoise.compression.training.stage_trainer import StageTrainer

CONFIG = IPQConfig(
    block_size=4, n_centroids=16, activation_bits=8, importance="activations",
    stages=["ffn", "attention"],
)  # fmt: skip


def make_trainer(folder, data, model=None, **changes):
    model = model or make_stacked("bert", 2)
    return make_pass_trainer(folder, model, data, bf16=True, **changes)


def autocast_of(module):
    """Whether autocast was on, at each of the forwards from now on."""
    seen = []
    module.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    return seen


def test_the_model_in_memory_is_the_one_that_is_loaded(tmp_path, parity_data, input_ids):
    trainer = make_trainer(tmp_path, parity_data)
    trainer.train()
    small = trainer.compress(CONFIG, CompressionArguments(stage_steps=2))
    assert not vars(small).keys() & {"forward", "_original_forward", "_is_accelerate_prepared"}
    small.save_pretrained(tmp_path / "small")
    again = AutoQuantizedModel.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(again(input_ids).logits, small(input_ids).logits)


def test_it_is_trained_and_evaluated_in_half_precision_afterwards(tmp_path, parity_data):
    trainer = make_trainer(tmp_path, parity_data)
    small = trainer.compress(CONFIG, CompressionArguments(stage_epochs=0))
    seen = autocast_of(small.classifier)
    trainer.evaluate()
    trainer.train()
    assert seen and all(seen)


def test_the_teacher_has_its_own_precision_whatever_was_done_before(
    tmp_path, parity_data, monkeypatch
):
    seen, real = [], Teacher.__init__

    def watched(teacher, *args):
        real(teacher, *args)
        seen.append(autocast_of(teacher.model.classifier))

    monkeypatch.setattr(Teacher, "__init__", watched)
    trainer = make_trainer(tmp_path, parity_data)
    trainer.train()
    trainer.compress(CONFIG, CompressionArguments(stage_steps=2))
    assert len(seen) == 1 and seen[0] and not any(seen[0])


def test_a_killed_pass_ends_with_the_same_model(tmp_path, parity_data, kill):
    changes = {"save_strategy": "steps", "save_steps": 2}
    arguments = CompressionArguments(stage_steps=4)
    straight = make_trainer(tmp_path / "a", parity_data, **changes)
    straight.compress(CONFIG, arguments)
    release = kill(StageTrainer, "training_step", 4)
    with pytest.raises(Killed):
        make_trainer(tmp_path / "b", parity_data, **changes).compress(CONFIG, arguments)
    release()
    model = spoilt(make_stacked("bert", 2))
    again = make_trainer(tmp_path / "b", parity_data, model, **changes)
    again.compress(CONFIG, arguments, resume_from_checkpoint=True)
    compare(again, straight)


def test_what_is_left_of_a_forward_is_that_of_the_class(tmp_path, parity_data, input_ids):
    """accelerate's own way leaves a forward without transformers' decorators."""
    trainer = make_trainer(tmp_path, parity_data)
    model = trainer.model
    trainer.evaluate()
    assert "forward" in vars(model)
    undo_accelerate_prepare(model)
    assert model.forward.__func__ is type(model).forward
    assert isinstance(model(input_ids, return_dict=False), tuple)
    of_class = model.forward
    own = model.forward = wraps(of_class)(lambda *args, **kwargs: of_class(*args, **kwargs))
    make_trainer(tmp_path, parity_data, model).evaluate()
    assert undo_accelerate_prepare(model).forward is own
