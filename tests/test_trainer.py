"""Noise training under ``Trainer``: checkpoints, resuming, the callback and the card."""

import copy
import inspect
import json

import pytest
import torch
from datasets import Dataset
from support.tiny import make_model
from support.trainers import assert_same, make_trainer, training_arguments
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
)

from hf_quantnoise import (
    CompressionArguments,
    IPQConfig,
    QuantNoiseCallback,
    QuantNoiseConfig,
    QuantNoiseTrainer,
    apply_quant_noise,
)
from hf_quantnoise.modeling import packed_layers
from hf_quantnoise.noise import find_state

NOISES = {
    "proxy": QuantNoiseConfig(noise="proxy", p=0.2),
    "pq": QuantNoiseConfig(noise="pq", p=0.2, n_centroids=16, codebook_update=2),
    "int8": QuantNoiseConfig(noise="int8", p=0.5, scale_update_steps=2),
    "both": QuantNoiseConfig(noise=["pq", "int8"], p=0.1, n_centroids=16),
}
# 96 rows in batches of 16: two epochs are 12 steps.
SAVING = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 4}


def make_bert_trainer(folder, data, noise=None, model=None, parts=None, **changes):
    model = model or make_model("bert")
    return make_trainer(folder, model, data, noise, parts=parts, **{**SAVING, **changes})


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, parity_data):
    """Name of a noise -> (output folder, final parameters) of a training with it."""
    runs = {}

    def train(name):
        if name not in runs:
            folder = tmp_path_factory.mktemp(name)
            trainer = make_bert_trainer(folder, parity_data, NOISES[name])
            trainer.train()
            runs[name] = folder, parameters(trainer.model)
        return runs[name]

    return train


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NOISES)
def test_resume_is_exact(name, trained, tmp_path, parity_data):
    folder, expected = trained(name)
    resumed = make_bert_trainer(tmp_path, parity_data, NOISES[name])
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-8"))
    assert_same(parameters(resumed.model), expected)


def test_resume_with_other_noise_is_refused(trained, tmp_path, parity_data):
    folder, _ = trained("proxy")
    trainer = make_bert_trainer(tmp_path, parity_data, NOISES["pq"])
    with pytest.raises(ValueError, match=r"'proxy'.*'pq'.*from_pretrained"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-12"))


@pytest.mark.parametrize("name", NOISES)
def test_checkpoints_load_in_transformers(name, trained):
    folder, expected = trained(name)
    config = json.loads((folder / "checkpoint-12" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    loaded, info = AutoModelForSequenceClassification.from_pretrained(
        folder / "checkpoint-12", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same(parameters(loaded), expected)
    assert QuantNoiseConfig.from_pretrained(folder / "checkpoint-12") == NOISES[name]


def test_the_best_model_is_loaded_at_the_end(tmp_path, parity_data):
    trainer = make_bert_trainer(
        tmp_path, parity_data, NOISES["pq"], parts={"eval_dataset": parity_data},
        eval_strategy="steps", eval_steps=4, load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    stored = BertForSequenceClassification.from_pretrained(trainer.state.best_model_checkpoint)
    assert_same(parameters(stored), parameters(trainer.model))
    assert find_state(trainer.model) is not None


def test_a_seed_reproduces_a_run(tmp_path, parity_data):
    def run(seed):
        trainer = make_trainer(
            tmp_path, make_model("bert"), parity_data, NOISES["proxy"], seed=seed, data_seed=0
        )
        trainer.train()
        return parameters(trainer.model)

    first = run(1)
    assert_same(first, run(1))
    assert not torch.equal(first["classifier.weight"], run(2)["classifier.weight"])


# ---- the callback in other trainers --------------------------------------------------------------


def test_the_callback_equals_quant_noise_trainer(trained, tmp_path, parity_data):
    _, expected = trained("pq")

    def run(resume=None):
        args = training_arguments(tmp_path, **SAVING)
        callbacks = [QuantNoiseCallback(NOISES["pq"])]
        trainer = Trainer(make_model("bert"), args, train_dataset=parity_data, callbacks=callbacks)
        trainer.train(resume_from_checkpoint=resume)
        return parameters(trainer.model)

    assert_same(run(), expected)
    assert_same(run(str(tmp_path / "checkpoint-8")), expected)


def test_resuming_from_another_folder_needs_load(tmp_path, parity_data, caplog):
    noise = NOISES["pq"]

    def run(folder, resume=None, load=False):
        model, callback = make_model("bert"), QuantNoiseCallback(noise)
        if load:
            callback.prepare(model)
            callback.load(model, resume)
        args = training_arguments(folder, **{**SAVING, "max_steps": 6})
        trainer = Trainer(model, args, train_dataset=parity_data, callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume)
        return parameters(model)

    expected = run(tmp_path / "a")
    checkpoint = str(tmp_path / "a" / "checkpoint-4")
    restored = run(tmp_path / "b", checkpoint, load=True)
    warning = "has no quantization noise"
    assert warning not in caplog.text
    assert_same(restored, expected)
    run(tmp_path / "c", checkpoint)
    assert warning in caplog.text


@pytest.mark.parametrize("by_hand", [False, True])
def test_codebooks_come_from_the_folder_of_the_weights(by_hand, tmp_path, parity_data):
    """Not from a checkpoint of the same step in ``output_dir``, which is of another run."""
    noise = QuantNoiseConfig(noise="pq", p=0.2, n_centroids=16)

    def run(folder, resume=None, seed=0):
        model, changes = make_model("bert", seed), {**SAVING, "max_steps": 6}
        if by_hand:
            callback = QuantNoiseCallback(noise)
            callback.prepare(model)
            if resume is not None:
                callback.load(model, resume)
            args = training_arguments(folder, **changes)
            trainer = Trainer(model, args, train_dataset=parity_data, callbacks=[callback])
        else:
            trainer = make_trainer(folder, model, parity_data, noise, **changes)
        trainer.train(resume_from_checkpoint=resume)
        return parameters(model)

    expected = run(tmp_path / "a")
    run(tmp_path / "b", seed=5)
    assert_same(run(tmp_path / "b", str(tmp_path / "a" / "checkpoint-4")), expected)


def test_noise_is_saved_on_each_node_with_save_on_each_node(tmp_path, parity_data):
    trainer = make_bert_trainer(tmp_path, parity_data, NOISES["pq"])
    trainer.state.global_step, trainer.state.is_world_process_zero = 4, False
    (tmp_path / "checkpoint-4").mkdir()
    callback = trainer.noise_callback
    callback.on_save(trainer.args, trainer.state, trainer.control, model=trainer.model)
    assert (tmp_path / "checkpoint-4" / "quant_noise_state.safetensors").is_file()


# ---- QuantNoiseTrainer ---------------------------------------------------------------------------


def test_noise_applied_by_hand_is_kept(tmp_path, parity_data):
    model = apply_quant_noise(make_model("bert"), NOISES["proxy"])
    state = find_state(model)
    trainer = make_trainer(tmp_path, model, parity_data, NOISES["proxy"], max_steps=1)
    trainer.train()
    assert find_state(trainer.model) is state


def test_without_noise_it_equals_trainer(tmp_path, parity_data):
    results = []
    for cls in (Trainer, QuantNoiseTrainer):
        args = training_arguments(tmp_path)
        trainer = cls(make_model("bert"), args, train_dataset=parity_data)
        trainer.train()
        results.append(parameters(trainer.model))
    assert_same(*results)


def test_model_init_gets_noise(tmp_path, parity_data):
    parts = {"model_init": lambda: make_model("bert")}
    trainer = make_trainer(tmp_path, None, parity_data, NOISES["proxy"], parts=parts, max_steps=1)
    trainer.train()
    assert find_state(trainer.model) is not None


def test_the_arguments_are_those_of_trainer():
    """Each is named, so that an IDE completes them; a new one of ``Trainer`` has to be added."""
    trainer, ours = (
        inspect.signature(cls.__init__).parameters for cls in (Trainer, QuantNoiseTrainer)
    )
    assert set(ours) == {*trainer, "qn_config", "teacher", "compression_args"}
    assert list(ours)[:4] == ["self", "model", "args", "qn_config"]


def test_compression_removes_noise_and_writes_a_card(tmp_path, parity_data):
    trainer = make_trainer(
        tmp_path, make_model("bert"), parity_data, NOISES["proxy"],
        parts={"eval_dataset": parity_data},
    )  # fmt: skip
    trainer.train()
    before = copy.deepcopy(trainer.model).eval()
    config = IPQConfig(n_centroids=16, leftover_bits=32)
    small = trainer.compress(config, CompressionArguments(stage_epochs=0))
    assert find_state(small) is None
    names = {type(module).__name__ for module in small.train().modules()}
    assert not any(name.startswith("QN") for name in names)
    assert torch.equal(before.classifier.weight, small.classifier.weight)
    trainer.create_model_card(model_name="small")
    _, metadata, body = (tmp_path / "README.md").read_text().split("---", 2)
    assert body.index("# small") < body.index("import hf_quantnoise") < body.index("## Results")
    assert "quant-noise" in metadata
    assert "`proxy`" in body and "0.2" in body
    assert "| dense | 0 | 0.0000 |" in body
    assert "More information needed" not in body
    assert all(f"| {stage} |" in body for stage in ("dense", "ffn", "embeddings", "attention"))
    assert "quant-noise" in small.model_tags


class Seq2SeqQuantNoiseTrainer(QuantNoiseTrainer, Seq2SeqTrainer):
    """The trainer together with that of encoder-decoder models."""


def test_trainer_works_together_with_seq2seq_trainer(tmp_path):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(
        T5Config(**sizes, vocab_size=64, decoder_start_token_id=0, pad_token_id=0)
    )
    data = Dataset.from_dict({"input_ids": [[5, 6, 7, 1]] * 8, "labels": [[8, 9, 1]] * 8})
    args = Seq2SeqTrainingArguments(
        str(tmp_path), max_steps=2, save_strategy="no", report_to="none", use_cpu=True,
        disable_tqdm=True, predict_with_generate=False,
    )  # fmt: skip
    config = IPQConfig(block_size=4, n_centroids=8, stages=["ffn"])
    noise = QuantNoiseConfig.matching(config)
    trainer = Seq2SeqQuantNoiseTrainer(model, args, noise, train_dataset=data, eval_dataset=data)
    trainer.train()
    small = trainer.compress(config, CompressionArguments(stage_steps=1))
    assert isinstance(small, T5ForConditionalGeneration) and any(packed_layers(small))
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.compression_history[-1]["metric"]["eval_loss"] > 0
