"""Records of a stage that was resumed: nothing that was measured on some of its steps only."""

import pytest
from support.tiny import make_model
from support.trainers import Killed, make_trainer

from hf_quantnoise import CompressionArguments, IPQConfig
from hf_quantnoise.compression.checkpoints import StageCheckpoints
from hf_quantnoise.compression.training.stage_trainer import StageTrainer

CONFIG = IPQConfig(block_size=4, n_centroids=8, stages=["ffn", "attention"])
STEPS = 5
# A kill in the first step after a checkpoint, and between the last step and the stage's files.
KILLS = {
    "inside": (StageTrainer, "training_step", 5),
    "at the end": (StageCheckpoints, "save_stage", 2),
}


def run(folder, data, resume=False):
    trainer = make_trainer(
        folder, make_model("bert"), data, save_strategy="steps", save_steps=2, logging_steps=1
    )
    trainer.compress(CONFIG, CompressionArguments(stage_steps=STEPS), resume_from_checkpoint=resume)
    return trainer


def logged(trainer, name):
    return [logs[name] for logs in trainer.state.log_history if name in logs]


@pytest.mark.parametrize("moment", KILLS)
def test_record_of_a_resumed_stage_has_no_loss_and_speed_of_some_steps(
    moment, tmp_path, parity_data, kill
):
    release = kill(*KILLS[moment])
    with pytest.raises(Killed):
        run(tmp_path, parity_data)
    release()
    trainer = run(tmp_path, parity_data, resume=True)
    _, resumed, complete = trainer.compression_history
    assert resumed["step"] == STEPS and resumed["finetuning"]
    assert not [name for name in resumed["finetuning"] if name.startswith("train_")]
    # The second stage was trained from its first step.
    assert logged(trainer, "compression/train_loss") == [complete["finetuning"]["train_loss"]]
    mean = sum(logged(trainer, "compression/loss")[-STEPS:]) / STEPS
    assert complete["finetuning"]["train_loss"] == pytest.approx(mean, rel=1e-4)
    assert complete["finetuning"]["train_steps_per_second"] > 0
