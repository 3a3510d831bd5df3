"""Finetuning of a packed model with ``Trainer``, resumed bit for bit."""

import logging
import shutil

import pytest
from support.tasks import TASKS
from support.tiny import make_model
from support.trainers import Rows, assert_same, tensors, training_arguments
from transformers import Trainer

from hf_quantnoise import ExactCheckpoints, IPQConfig, quantize_model

PQ = {"block_size": 4, "n_centroids": 8}


def trained(folder, config, resume=False, exact=True):
    """Train for four steps; return the tensors in memory."""
    model = quantize_model(make_model("bert"), config, progress=False)
    args = training_arguments(
        folder, max_steps=4, per_device_train_batch_size=8, save_strategy="steps", save_steps=2
    )
    trainer = Trainer(model, args, train_dataset=Rows(TASKS["classification"][1]()))
    if exact:
        trainer.add_callback(ExactCheckpoints(trainer))
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    return tensors(trainer.model)


@pytest.mark.parametrize(
    "config",
    [IPQConfig(**PQ), IPQConfig(**PQ, codebook_bits=8), IPQConfig(**PQ, row_scale=True)],
    ids=["16 bits", "8 bits", "row scale"],
)
def test_resumed_finetuning_of_a_packed_model_is_bit_equal(config, tmp_path):
    complete = trained(tmp_path, config)
    assert_same(trained(tmp_path, config, resume=True), complete)
    with pytest.raises(AssertionError):  # a checkpoint of Trainer alone is rounded
        assert_same(trained(tmp_path, config, resume=True, exact=False), complete)


def test_resuming_without_the_tensors_warns(tmp_path, caplog):
    trained(tmp_path, IPQConfig(**PQ))
    (tmp_path / "checkpoint-2" / "memory.safetensors").unlink()
    shutil.rmtree(tmp_path / "checkpoint-4")
    with caplog.at_level(logging.WARNING):
        trained(tmp_path, IPQConfig(**PQ), resume=True)
    assert "training resumes from rounded values" in caplog.text
