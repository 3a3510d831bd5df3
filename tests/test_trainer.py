"""The noise phase under ``Trainer``: checkpoints, resuming, the callback, the card."""

import copy
import json

import pytest
import torch
from support.tiny import make_model
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_quantnoise import (
    CompressionArguments,
    IPQConfig,
    QuantNoiseCallback,
    QuantNoiseConfig,
    QuantNoiseTrainer,
    apply_quant_noise,
)
from hf_quantnoise.noise import find_state

NOISES = {
    "proxy": QuantNoiseConfig(noise="proxy", p=0.2),
    "pq": QuantNoiseConfig(noise="pq", p=0.2, n_centroids=16, codebook_update=2),
    "int8": QuantNoiseConfig(noise="int8", p=0.5, scale_update_steps=2),
    "both": QuantNoiseConfig(noise=["pq", "int8"], p=0.1, n_centroids=16),
}


def arguments(folder, **changes):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 16,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_steps": 4,
        **changes,
    }
    return TrainingArguments(**settings)


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
def test_resuming_in_the_noise_phase_is_bit_exact(noise, tmp_path, parity_data):
    def trainer(folder):
        return QuantNoiseTrainer(
            make_model("bert"), arguments(folder), noise, train_dataset=parity_data
        )

    straight = trainer(tmp_path / "a")
    straight.train()
    resumed = trainer(tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-8"))
    assert_same(parameters(straight.model), parameters(resumed.model))


def test_resuming_with_another_noise_is_refused(tmp_path, parity_data):
    def trainer(noise):
        return QuantNoiseTrainer(
            make_model("bert"), arguments(tmp_path), noise, train_dataset=parity_data
        )

    trainer(NOISES["proxy"]).train()
    with pytest.raises(ValueError, match="'proxy' noise.*this run's 'pq'.*from_pretrained"):
        trainer(NOISES["pq"]).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
def test_checkpoints_of_the_noise_phase_are_plain(noise, tmp_path, parity_data):
    trainer = QuantNoiseTrainer(
        make_model("bert"), arguments(tmp_path), noise, train_dataset=parity_data
    )
    trainer.train()
    folder = tmp_path / "checkpoint-12"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    plain, info = AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same(parameters(plain), parameters(trainer.model))
    assert QuantNoiseConfig.from_pretrained(folder) == noise


def test_the_best_model_is_loaded_at_the_end(tmp_path, parity_data):
    trainer = QuantNoiseTrainer(
        make_model("bert"),
        arguments(tmp_path, eval_strategy="steps", eval_steps=4, load_best_model_at_end=True),
        NOISES["pq"],
        train_dataset=parity_data,
        eval_dataset=parity_data,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    stored = BertForSequenceClassification.from_pretrained(best)
    assert_same(parameters(stored), parameters(trainer.model))
    assert find_state(trainer.model) is not None


def test_a_seed_reproduces_a_run_and_another_does_not(tmp_path, parity_data):
    def run(seed):
        trainer = QuantNoiseTrainer(
            make_model("bert"),
            arguments(tmp_path, seed=seed, data_seed=0, save_strategy="no"),
            NOISES["proxy"],
            train_dataset=parity_data,
        )
        trainer.train()
        return parameters(trainer.model)

    assert_same(run(1), run(1))
    weight = "classifier.weight"
    assert not torch.equal(run(1)[weight], run(2)[weight])


def test_the_callback_does_the_same_for_a_plain_trainer(tmp_path, parity_data):
    noise = NOISES["pq"]
    trainer = Trainer(make_model("bert"), arguments(tmp_path / "a"), train_dataset=parity_data)
    trainer.add_callback(QuantNoiseCallback(noise))
    trainer.train()
    ours = QuantNoiseTrainer(
        make_model("bert"), arguments(tmp_path / "b"), noise, train_dataset=parity_data
    )
    ours.train()
    assert_same(parameters(trainer.model), parameters(ours.model))
    resumed = Trainer(make_model("bert"), arguments(tmp_path / "a"), train_dataset=parity_data)
    resumed.add_callback(QuantNoiseCallback(noise))
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-8"))
    assert_same(parameters(resumed.model), parameters(ours.model))


class ReadsTheHead(BertForSequenceClassification):
    """Multiplies with the classifier's weight instead of calling it, as TRL's SFTTrainer does."""

    head = "classifier"

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        pooled = self.bert(input_ids, attention_mask).pooler_output
        logits = pooled @ self.classifier.weight.T + self.classifier.bias
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


class ReadsTheTiedHead(GPT2LMHeadModel):
    """The same where the head's weight is the table's, which is looked up."""

    head = "lm_head"

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        hidden = self.transformer(input_ids, attention_mask=attention_mask).last_hidden_state
        logits = hidden @ self.lm_head.weight.T
        loss = torch.nn.functional.cross_entropy(logits[:, -1], labels)
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize("kind", [ReadsTheHead, ReadsTheTiedHead])
@pytest.mark.parametrize("steps", [2, 10])
def test_a_layer_that_noise_does_not_reach_is_told_of_once(
    kind, tmp_path, parity_data, caplog, steps
):
    model = kind(make_model("bert" if kind is ReadsTheHead else "gpt2").config)
    trainer = Trainer(
        model,
        arguments(tmp_path, save_strategy="no", max_steps=steps),
        train_dataset=parity_data,
        callbacks=[QuantNoiseCallback(NOISES["proxy"])],
    )
    trainer.train()
    told = [text for text in caplog.messages if "no quantization noise on" in text]
    assert len(told) == 1 and f"no quantization noise on {kind.head}:" in told[0]


def test_a_run_resumed_from_another_folder_says_that_its_codebooks_are_new(
    tmp_path, parity_data, caplog
):
    def run(folder, callback, resume=None, **changes):
        model = make_model("bert")
        if resume and changes.get("prepared"):
            callback.prepare(model)
            callback.load(model, resume)
        settings = arguments(folder, max_steps=6, save_steps=4)
        trainer = Trainer(model, settings, train_dataset=parity_data, callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume)
        return parameters(model)

    noise = NOISES["pq"]
    whole = run(tmp_path / "a", QuantNoiseCallback(noise))
    checkpoint = str(tmp_path / "a" / "checkpoint-4")
    told = "holds no quantization noise"
    assert told not in caplog.text
    restored = run(tmp_path / "b", QuantNoiseCallback(noise), checkpoint, prepared=True)
    assert told not in caplog.text
    assert_same(restored, whole)
    run(tmp_path / "c", QuantNoiseCallback(noise), checkpoint)
    assert told in caplog.text


@pytest.mark.parametrize("prepared", [False, True], ids=["by the trainer", "by hand"])
def test_a_checkpoint_of_the_same_step_in_the_own_folder_is_left_alone(
    prepared, tmp_path, parity_data
):
    """Codebooks come from where the weights come from, not from another run's folder."""
    noise = QuantNoiseConfig(noise="pq", p=0.2, n_centroids=16)

    def run(folder, resume=None, seed=0):
        settings = arguments(folder, max_steps=6, save_steps=4)
        model, callback = make_model("bert", seed), QuantNoiseCallback(noise)
        if not prepared:
            trainer = QuantNoiseTrainer(model, settings, noise, train_dataset=parity_data)
        else:
            callback.prepare(model)
            if resume is not None:
                callback.load(model, resume)
            trainer = Trainer(model, settings, train_dataset=parity_data, callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume)
        return parameters(model)

    whole = run(tmp_path / "a")
    run(tmp_path / "b", seed=5)
    assert_same(run(tmp_path / "b", str(tmp_path / "a" / "checkpoint-4")), whole)


def test_noise_is_saved_on_each_node_where_that_is_asked_for(tmp_path, parity_data):
    """As Trainer's own files are; a second machine would go on with other codebooks."""
    trainer = QuantNoiseTrainer(
        make_model("bert"), arguments(tmp_path), NOISES["pq"], train_dataset=parity_data
    )
    trainer.state.global_step, trainer.state.is_world_process_zero = 4, False
    (tmp_path / "checkpoint-4").mkdir()
    callback = trainer.noise_callback
    callback.on_save(trainer.args, trainer.state, trainer.control, model=trainer.model)
    assert (tmp_path / "checkpoint-4" / "quant_noise_state.safetensors").is_file()


def test_codebooks_are_refreshed_when_they_are_due(tmp_path, parity_data, monkeypatch):
    def refreshes(**fields):
        noise = QuantNoiseConfig(noise=["pq", "int8"], p=0.1, n_centroids=16, **fields)
        trainer = QuantNoiseTrainer(
            make_model("bert"), arguments(tmp_path), noise, train_dataset=parity_data
        )
        counts = {"refresh_codebooks": 0, "refresh_scales": 0}
        for name in counts:
            original = getattr(type(find_state(trainer.model)), name)

            def counted(self, name=name, original=original):
                counts[name] += 1
                return original(self)

            monkeypatch.setattr(type(find_state(trainer.model)), name, counted)
        trainer.train()
        monkeypatch.undo()
        return counts

    # 96 rows, batches of 16, 2 epochs: 12 steps. The fit of the start is apply_quant_noise's.
    assert refreshes() == {"refresh_codebooks": 1, "refresh_scales": 1}
    assert refreshes(codebook_update=5) == {"refresh_codebooks": 2, "refresh_scales": 1}
    assert refreshes(scale_update_steps=3)["refresh_scales"] == 3


def test_codebooks_are_refreshed_with_each_pass_over_data_of_unknown_length(
    tmp_path, parity_data, monkeypatch
):
    """Trainer counts all steps of such data as one epoch."""
    noise = QuantNoiseConfig(noise="pq", p=0.1, n_centroids=16)
    trainer = QuantNoiseTrainer(
        make_model("bert"), arguments(tmp_path, max_steps=15), noise,
        train_dataset=parity_data.to_iterable_dataset(),
    )  # fmt: skip
    state, steps = find_state(trainer.model), []
    monkeypatch.setattr(state, "refresh_codebooks", lambda: steps.append(trainer.state.global_step))
    trainer.train()
    assert steps == [6, 12]


def test_the_rate_warms_up_and_a_resumed_run_goes_on_with_it(tmp_path, parity_data):
    noise = QuantNoiseConfig(noise=["pq", "int8"], p=[0.4, 0.2], n_centroids=16, p_schedule=8)
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(find_state(kwargs["model"]).p)

    trainer = QuantNoiseTrainer(
        make_model("bert"), arguments(tmp_path), noise,
        train_dataset=parity_data, callbacks=[Watch()],
    )  # fmt: skip
    trainer.train()
    expected = [(0.4 * min(1, t / 8), 0.2 * min(1, t / 8)) for t in range(1, 13)]
    assert seen == [pytest.approx(rates) for rates in expected]
    first, seen[:] = list(seen), []
    resumed = QuantNoiseTrainer(
        make_model("bert"), arguments(tmp_path), noise,
        train_dataset=parity_data, callbacks=[Watch()],
    )  # fmt: skip
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert seen == first[4:]


def test_noise_by_hand_is_taken_as_it_is(tmp_path, parity_data):
    model = apply_quant_noise(make_model("bert"), NOISES["proxy"])
    state = find_state(model)
    trainer = QuantNoiseTrainer(
        model, arguments(tmp_path, save_strategy="no"), NOISES["proxy"], train_dataset=parity_data
    )
    trainer.train()
    assert find_state(trainer.model) is state


def test_without_a_config_it_is_a_trainer(tmp_path, parity_data):
    settings = arguments(tmp_path, save_strategy="no")
    results = []
    for kind in (Trainer, QuantNoiseTrainer):
        trainer = kind(make_model("bert"), settings, train_dataset=parity_data)
        trainer.train()
        results.append(parameters(trainer.model))
    assert_same(*results)


def test_model_init_gets_its_noise(tmp_path, parity_data):
    trainer = QuantNoiseTrainer(
        args=arguments(tmp_path, save_strategy="no"),
        qn_config=NOISES["proxy"],
        model_init=lambda: make_model("bert"),
        train_dataset=parity_data,
    )
    trainer.train()
    assert find_state(trainer.model) is not None


def test_the_card_says_how_to_load_before_anything_else(tmp_path, parity_data):
    trainer = QuantNoiseTrainer(
        make_model("bert"),
        arguments(tmp_path, save_strategy="no", num_train_epochs=1),
        NOISES["proxy"],
        train_dataset=parity_data,
        eval_dataset=parity_data,
    )
    trainer.train()
    small = trainer.compress(IPQConfig(n_centroids=16), CompressionArguments(stage_epochs=0))
    trainer.create_model_card(model_name="small")
    card = (tmp_path / "README.md").read_text()
    body = card.split("---", 2)[2]
    assert body.index("# small") < body.index("import hf_quantnoise") < body.index("## Results")
    assert "quant-noise" in card.split("---", 2)[1]
    assert "`proxy` at rate 0.2" in body
    assert "| dense | 0 | 0.0000 |" in body and "More information needed" not in body
    assert all(f"| {stage} |" in body for stage in ("dense", "ffn", "embeddings", "attention"))
    assert "quant-noise" in small.model_tags


def test_compress_leaves_a_noise_free_model(tmp_path, parity_data):
    trainer = QuantNoiseTrainer(
        make_model("bert"), arguments(tmp_path), NOISES["proxy"], train_dataset=parity_data
    )
    clean = copy.deepcopy(trainer.model).eval()
    small = trainer.compress(IPQConfig(n_centroids=16), CompressionArguments(stage_epochs=0))
    assert find_state(small) is None
    small.train()
    names = {type(module).__name__ for module in small.modules()}
    assert not any(name.startswith("QN") for name in names)
    assert torch.equal(clean.classifier.weight, small.classifier.weight)
