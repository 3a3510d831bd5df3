"""Compression under bf16 autocast: the model has no traces of it, and interrupted runs resume."""

from functools import wraps

import pytest
import torch
from support.stacked import make_stacked
from support.trainers import Killed, assert_same_result, make_trainer, with_other_weights

from hf_quantnoise import AutoQuantizedModel, CompressionArguments, IPQConfig
from hf_quantnoise.compat import undo_accelerate_prepare
from hf_quantnoise.compression.distillation.teacher import Teacher
from hf_quantnoise.compression.training.stage_trainer import StageTrainer

CONFIG = IPQConfig(
    block_size=4, n_centroids=16, activation_bits=8, importance="activations",
    stages=["ffn", "attention"],
)  # fmt: skip
SHORT = CompressionArguments(stage_steps=2)


def make_bf16_trainer(folder, data, model=None, **changes):
    model = model or make_stacked("bert", 2)
    parts = {"eval_dataset": data}
    return make_trainer(folder, model, data, parts=parts, bf16=True, **changes)


def record_autocast(module):
    """Return a list that gets, for each further forward, whether autocast was on."""
    seen = []
    module.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    return seen


def test_autocast_is_on_in_training_and_evaluation_only(
    tmp_path, parity_data, input_ids, monkeypatch
):
    teachers, real = [], Teacher.__init__

    def init(teacher, *args):
        real(teacher, *args)
        teachers.append(record_autocast(teacher.model.classifier))

    monkeypatch.setattr(Teacher, "__init__", init)
    trainer = make_bf16_trainer(tmp_path, parity_data)
    trainer.train()
    small = trainer.compress(CONFIG, SHORT)
    # The teacher runs without.
    (in_teacher,) = teachers
    assert in_teacher and not any(in_teacher)
    # The model in memory is equal to the one that is loaded.
    assert not vars(small).keys() & {"forward", "_original_forward", "_is_accelerate_prepared"}
    small.save_pretrained(tmp_path / "small")
    loaded = AutoQuantizedModel.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(loaded(input_ids).logits, small(input_ids).logits)
    # Afterwards it is evaluated and trained with autocast again.
    seen = record_autocast(small.classifier)
    trainer.evaluate()
    trainer.train()
    assert seen and all(seen)


def test_every_evaluation_of_a_run_uses_autocast(tmp_path, parity_data):
    """Also the second one before the first stage, of the model with fewer layers."""
    config = IPQConfig(block_size=4, n_centroids=16, stages=["ffn"], prune_layers="every_other")
    trainer = make_bf16_trainer(tmp_path, parity_data)
    seen = record_autocast(trainer.model.classifier)
    trainer.compress(config, CompressionArguments(stage_epochs=0))
    assert len(trainer.compression_history) == 3
    assert len(seen) == 3 * 12 and all(seen)  # batches of 8 examples


def test_an_interrupted_run_resumes(tmp_path, parity_data, kill):
    changes = {"save_strategy": "steps", "save_steps": 2}
    arguments = CompressionArguments(stage_steps=4)
    straight = make_bf16_trainer(tmp_path / "a", parity_data, **changes)
    straight.compress(CONFIG, arguments)
    release = kill(StageTrainer, "training_step", 4)
    with pytest.raises(Killed):
        make_bf16_trainer(tmp_path / "b", parity_data, **changes).compress(CONFIG, arguments)
    release()
    model = with_other_weights(make_stacked("bert", 2))
    resumed = make_bf16_trainer(tmp_path / "b", parity_data, model, **changes)
    resumed.compress(CONFIG, arguments, resume_from_checkpoint=True)
    assert_same_result(resumed, straight)


def test_undo_accelerate_prepare_restores_the_forward(tmp_path, parity_data, input_ids):
    """accelerate's own way leaves a forward without transformers' decorators."""
    trainer = make_bf16_trainer(tmp_path, parity_data)
    model = trainer.model
    trainer.evaluate()
    assert "forward" in vars(model)
    undo_accelerate_prepare(model)
    assert model.forward.__func__ is type(model).forward
    assert isinstance(model(input_ids, return_dict=False), tuple)
    class_forward = model.forward
    own = model.forward = wraps(class_forward)(
        lambda *args, **kwargs: class_forward(*args, **kwargs)
    )
    make_bf16_trainer(tmp_path, parity_data, model).evaluate()
    assert undo_accelerate_prepare(model).forward is own
