"""``--recipe`` from the command line to the compressed model, and what it prints and refuses."""

import json
import shutil

import pytest
import torch

pytest.importorskip("datasets")

from support.trainers import assert_same
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, set_seed

from hf_quantnoise import recipe
from hf_quantnoise.noise import find_state
from hf_quantnoise.runs import post_training
from hf_quantnoise.runs.glue import main, parse

FLAGS = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 16,
    "learning_rate": 1e-3,
    "use_cpu": True,
    "disable_tqdm": True,
    "plots": False,
    "recipe": "13x",
}


@pytest.fixture(scope="session")
def checkpoint(tiny_model, tmp_path_factory) -> str:
    """Folder of a random BERT that is large enough for a recipe, with a tokenizer."""
    folder = tmp_path_factory.mktemp("recipe") / "model"
    shutil.copytree(tiny_model, folder)
    config = BertConfig.from_pretrained(tiny_model, hidden_size=128, intermediate_size=512)
    set_seed(0)
    BertModel(config).save_pretrained(folder)
    return str(folder)


def words_of(folder, checkpoint, *words: str, **flags) -> list[str]:
    flags = {"model_name_or_path": checkpoint, "output_dir": folder, **FLAGS, **flags}
    return [word for name, v in flags.items() for word in (f"--{name}", str(v))] + list(words)


def test_run_with_a_recipe_ends_as_it_was_trained(checkpoint, write_sets, tmp_path, monkeypatch, capsys):
    seen = {}
    train = post_training.QuantNoiseTrainer.train

    def spy(trainer, *args, **kwargs):
        name = "finetuning" if trainer.qn_config is None else "noise"
        seen[name] = trainer
        seen[f"{name} teacher"] = trainer.given_teacher
        return train(trainer, *args, **kwargs)

    compress = post_training.QuantNoiseTrainer.compress

    def noisy_logits(trainer, *args, **kwargs):
        model = trainer.model
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        find_state(model).refresh_codebooks()
        batch = next(iter(trainer.get_eval_dataloader()))
        with torch.no_grad():
            seen["batch"], seen["logits"] = batch, model.train()(**batch).logits
        return compress(trainer, *args, **kwargs)

    monkeypatch.setattr(post_training.QuantNoiseTrainer, "train", spy)
    monkeypatch.setattr(post_training.QuantNoiseTrainer, "compress", noisy_logits)
    results = main(words_of(tmp_path / "out", checkpoint, *write_sets()))
    settings = recipe("13x", AutoModelForSequenceClassification.from_pretrained(checkpoint))

    # The finetuning has no noise; the finetuned model is the teacher.
    dense = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "dense")
    assert_same(dict(seen["noise teacher"].state_dict()), dict(dense.state_dict()))
    assert seen["finetuning teacher"] is None
    steps = [seen[name].state.max_steps for name in ("finetuning", "noise")]
    assert steps == [4, 4 * settings.length]
    assert seen["noise"].qn_config.to_dict() | {"seed": 0} == settings.noise.to_dict()

    # The packed model is the one that was trained, and has the named size.
    small = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "compressed")
    with torch.no_grad():
        assert torch.equal(small.eval()(**seen["batch"]).logits, seen["logits"])
    assert results["dense"]["bytes"] / results["compressed"]["bytes"] >= 13
    assert results["reloaded"]["metrics"]["accuracy"] >= 0.9
    text = capsys.readouterr().out
    assert "--recipe 13x: encoder, " in text and "--noise_rate [1.0]\n" in text
