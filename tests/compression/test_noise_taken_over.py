"""Training with trained centroids and a teacher, and the compression that takes the result over."""

import copy
from dataclasses import replace

import pytest
import torch
from support.decode_only import decode_only
from support.tasks import TASKS
from support.tiny import make_model
from support.trainers import (
    Killed,
    Rows,
    assert_same,
    assert_same_result,
    make_trainer,
    training_arguments,
    with_other_weights,
)
from torch import nn
from transformers import Trainer
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from hf_quantnoise import (
    CompressionArguments,
    IPQConfig,
    QuantNoiseCallback,
    QuantNoiseConfig,
    apply_quant_noise,
    quantize_model,
)
from hf_quantnoise.compression.training.stage_trainer import StageTrainer
from hf_quantnoise.modeling import fitted_weights, packed_layers
from hf_quantnoise.noise import find_state
from hf_quantnoise.quantizers import ProductQuantizer
from hf_quantnoise.quantizers.packing import unpack_codes

# Leftovers in 8 bits would differ from the training.
TARGET = IPQConfig(block_size=4, n_centroids=8, leftover_bits=32)


def joint_noise(**changes):
    """Return noise with trained centroids on all layers of the target."""
    settings = {"noise": "pq", "p": 1.0, "learn_codebooks": True, "codebook_update": 3}
    settings["block_size"] = {"ffn": 4, "embeddings": 4, "attention": 4}
    return QuantNoiseConfig.matching(TARGET, **settings | {"target_modules": ".*"} | changes)


def joint_trainer(folder, teacher=None, noise=None, **arguments):
    make, batch = TASKS["classification"]
    parts = {
        "teacher": teacher,
        "compression_args": CompressionArguments(codebook_learning_rate=1e-3, stage_epochs=0),
    }
    return make_trainer(
        folder, make(), Rows(batch()), noise or joint_noise(), parts=parts,
        per_device_train_batch_size=8, **arguments,
    )  # fmt: skip


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def test_packing_takes_over_centroids_and_codes_bit_for_bit(tmp_path):
    trainer = joint_trainer(tmp_path, num_train_epochs=2)
    before = [p.detach().clone() for p in find_state(trainer.model).parameters()]
    trainer.train()
    state = find_state(trainer.model)
    assert all(not torch.equal(a, b) for a, b in zip(before, state.parameters(), strict=True))
    state.refresh_codebooks()  # the codes follow the last step
    model = without_dropout(trainer.model).train()
    inputs = {
        name: value for name, value in trainer.train_dataset.batch.items() if name != "labels"
    }
    with torch.no_grad():
        expected = model(**inputs).logits
        packed = decode_only(trainer.compress(TARGET))
        assert torch.equal(packed(**inputs).logits, expected)


def test_resumed_training_ends_with_the_same_centroids(tmp_path):
    settings = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 2}
    settings["lr_scheduler_type"] = "constant"
    complete = joint_trainer(tmp_path / "complete", **settings)
    complete.train()
    stopped = joint_trainer(tmp_path / "stopped", **settings)
    stopped.args.max_steps = 4
    stopped.train()
    resumed = joint_trainer(tmp_path / "stopped", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-4"))
    assert_same(find_state(resumed.model).state_dict(), find_state(complete.model).state_dict())
    assert_same(dict(resumed.model.state_dict()), dict(complete.model.state_dict()))


def test_distilled_noise_follows_the_teacher(tmp_path):
    """With the weight 1 the labels are not used; the loss is the divergence from the teacher."""
    make, batch = TASKS["classification"]
    teacher = make()
    with torch.no_grad():
        teacher.classifier.weight.mul_(20.0)
    divergences = []
    for distill in (True, False):
        trainer = joint_trainer(
            tmp_path, teacher if distill else None, num_train_epochs=10, learning_rate=3e-3
        )
        trainer.train()
        inputs = {name: value for name, value in batch().items() if name != "labels"}
        with torch.no_grad():
            logits = trainer.compress(TARGET)(**inputs).logits
            expected = teacher(**inputs).logits
        divergences.append(
            nn.functional.kl_div(
                logits.log_softmax(-1), expected.log_softmax(-1),
                log_target=True, reduction="batchmean",
            )
        )  # fmt: skip
    assert divergences[0] < 0.5 * divergences[1]


def test_packed_codes_are_those_of_the_last_forward(tmp_path):
    """Codes are renewed every few steps; packing takes those that the model was trained with."""
    trainer = joint_trainer(tmp_path, noise=joint_noise(codebook_update=1000), num_train_epochs=2)
    trainer.train()
    codes = {
        weight.names[0]: weight.noise.functions[0][1].state["codes"].clone()
        for weight in find_state(trainer.model).weights
    }
    model = trainer.compress(TARGET)
    for name, expected in codes.items():
        layer = model.get_submodule(name)
        packed = unpack_codes(layer.weight_indices, layer.quantizer.code_bits, expected.numel())
        assert torch.equal(packed.view(expected.shape), expected.to(packed.dtype)), name


def test_interrupted_compression_takes_over_the_centroids(tmp_path, kill):
    """Without the saved centroids, a resumed run would run k-means on the second stage."""
    arguments = CompressionArguments(stage_epochs=1, distill=False)
    target = replace(TARGET, stages=["ffn", "embeddings", "attention"])

    def run(name, resume=False):
        settings = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 1}
        trainer = joint_trainer(tmp_path / name, **settings)
        if resume:
            with_other_weights(trainer.model)
            find_state(trainer.model).refresh_codebooks()
        else:
            trainer.train()
        trainer.compress(target, arguments, resume_from_checkpoint=resume)
        return trainer

    uninterrupted = run("straight")
    release = kill(StageTrainer, "training_step", 3)
    with pytest.raises(Killed):
        run("killed")
    release()
    assert_same_result(run("killed", resume=True), uninterrupted)


def test_stages_quantize_the_weights_that_earlier_stages_finetuned(tmp_path):
    """Codes of the training belong to other weights then; frozen ones still have them."""
    target = replace(TARGET, stages=["ffn", "attention"])
    trainer = joint_trainer(tmp_path, num_train_epochs=1)
    trainer.train()
    frozen = "bert.encoder.layer.0.attention.self.query"
    trainer.model.get_submodule(frozen).weight.requires_grad_(False)
    kept = {
        weight.names[0]: weight.noise.functions[0][1].state["codes"].clone()
        for weight in find_state(trainer.model).weights
    }
    settings = {"steps": 10, "learning_rate": 0.02}
    arguments = CompressionArguments(
        stage_epochs=0, stage_settings={"ffn": settings}, distill=False
    )
    finetuned = {}

    def keep_weights(record):
        if record.stage == "ffn":
            for name in kept:
                if "attention" in name:
                    weight = trainer.model.get_submodule(name).weight
                    finetuned[name] = weight.detach().clone()

    model = trainer.compress(target, arguments, report=keep_weights)
    for name, weight in finetuned.items():
        layer = model.get_submodule(name)
        with torch.no_grad():
            error = float((layer.decode() - weight).square().sum() / weight.square().sum())
            nearest = layer.quantizer.encode(weight, layer.state)
        if name == frozen:
            assert torch.equal(layer.codes().int(), kept[name].int())
        else:
            assert torch.equal(layer.codes(), nearest) and error < 0.5, (name, error)


def test_other_blocks_than_those_of_the_noise_are_named(tmp_path):
    trainer = joint_trainer(tmp_path, num_train_epochs=1)
    trainer.train()
    with CaptureLogger(logging.get_logger(fitted_weights.__name__)) as log:
        trainer.compress(replace(TARGET, block_size={"ffn": 8, "embeddings": 4, "attention": 4}))
    message = log.out
    assert "the trained centroids of" in message and "intermediate.dense" in message
    assert "QuantNoiseConfig.matching" in message


def test_an_optimizer_without_the_centroids_is_refused(tmp_path):
    make, batch = TASKS["classification"]
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = make_trainer(
        tmp_path, model, Rows(batch()), joint_noise(), parts={"optimizers": (optimizer, None)}
    )
    with pytest.raises(ValueError, match=r"learn_codebooks=True.*parameters\(\)"):
        trainer.train()
    optimizer.add_param_group({"params": find_state(model).parameters()})
    trainer.train()


def test_the_stock_trainer_trains_centroids_as_the_message_says(tmp_path):
    make, batch = TASKS["classification"]
    callback = QuantNoiseCallback(joint_noise(codebook_update=1000))
    model = make()
    args = training_arguments(tmp_path, per_device_train_batch_size=8)
    data = Rows(batch())
    with pytest.raises(ValueError, match="learn_codebooks=True"):
        Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
    callback.prepare(model)
    centroids = find_state(model).parameters()
    before = [each.detach().clone() for each in centroids]
    optimizer = torch.optim.SGD([*model.parameters(), *centroids], 0.1)
    trainer = Trainer(
        model, args, train_dataset=data, callbacks=[callback], optimizers=(optimizer, None)
    )
    trainer.train()
    assert all(not torch.equal(a, b) for a, b in zip(before, centroids, strict=True))
    assert all(each.grad is None for each in centroids)  # the next step starts from zero


def test_a_teacher_that_does_not_fit_is_refused(tmp_path):
    make, batch = TASKS["classification"]
    model = make()
    with pytest.raises(ValueError, match=r"invalid teacher: got the model that is trained"):
        make_trainer(tmp_path, model, Rows(batch()), parts={"teacher": model})
    with pytest.raises(TypeError, match="invalid teacher"):
        make_trainer(tmp_path, model, Rows(batch()), parts={"teacher": "gpt2"})
    with pytest.raises(TypeError, match="invalid compression_args"):
        make_trainer(tmp_path, model, Rows(batch()), parts={"compression_args": {}})
    without = CompressionArguments(distill=False)
    with pytest.raises(ValueError, match="distill=False, and a teacher is given"):
        make_trainer(
            tmp_path, model, Rows(batch()), parts={"teacher": make(), "compression_args": without}
        )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parts = {"teacher": make_model("bert-mlm")}
    with pytest.raises(ValueError, match=r"logits"):
        make_trainer(tmp_path, model, Rows(batch()), parts=parts).train()
    assert_same(dict(model.state_dict()), before)


def test_matching_with_a_model_has_exactly_the_layers_of_the_plan():
    """Each layer that the target stores as blocks has the same blocks in the noise, and no other
    layer has noise."""
    model = TASKS["classification"][0]()
    target = IPQConfig(
        block_size={"ffn": 8, "attention": 4}, n_centroids={"ffn": 16, "attention": 8},
        stages=["ffn", "attention"],
        layer_quantizers={"bert.encoder.layer.0.output.dense": {"scheme": "dense"}},
    )  # fmt: skip
    noise = QuantNoiseConfig.matching(target, model, noise="pq", learn_codebooks=True, p=1.0)
    noised = {
        weight.names[0]: (function.block_size, function.quantizer.n_centroids)
        for weight in find_state(apply_quant_noise(copy.deepcopy(model), noise)).weights
        for _, function in weight.noise.functions
    }
    packed = quantize_model(model, target)
    stored = {
        name: (layer.quantizer.block_size, layer.quantizer.n_centroids)
        for name, layer in packed_layers(packed)
        if isinstance(layer.quantizer, ProductQuantizer)
    }
    assert noised == stored
    assert "bert.encoder.layer.0.output.dense" not in noised


def test_latent_weights_are_not_the_baseline(tmp_path, capsys):
    trainer = joint_trainer(tmp_path, max_steps=1)
    trainer.eval_dataset = trainer.train_dataset
    logged = []
    trainer.log = lambda values, *_: logged.extend(values)
    trainer.train()
    trainer.compress(TARGET)
    first = trainer.compression_history[0]
    assert first["stage"] == "latent weights" and first["metric"]["eval_loss"] > 0
    assert capsys.readouterr().out.startswith("latent weights    0 layers")
    assert "compression/latent_loss" in logged and "compression/dense_loss" not in logged
    card = str(trainer.quantnoise_card().render(trainer.model))
    assert "latent weights" in card and "original" not in card and "| compressed |" in card
    trainer.dense_metrics = {"eval_loss": 0.1234, "eval_perplexity": 1.0}
    card = str(trainer.quantnoise_card().render(trainer.model))
    assert "| original | compressed |" in card and "0.1234" in card and "perplexity" not in card


@pytest.mark.parametrize("p", [0.5, 0.99])
def test_weights_trained_with_less_noise_are_the_dense_model(tmp_path, p):
    trainer = joint_trainer(tmp_path, noise=joint_noise(p=p, learn_codebooks=False))
    trainer.compress(TARGET)
    assert trainer.compression_history[0]["stage"] == "dense"
