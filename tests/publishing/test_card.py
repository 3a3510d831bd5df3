"""Model cards: text compared to a stored card, metadata, metrics of the current model only."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from golden.make import HERE as GOLDEN
from huggingface_hub import ModelCard
from support.stacked import make_stacked
from support.tiny import make_model, make_vision_model
from support.trainers import make_trainer
from transformers import TrainerCallback

from hf_quantnoise import (
    AutoQuantizedModel,
    CompressionArguments,
    IPQConfig,
    QuantNoiseCard,
    QuantNoiseConfig,
    apply_quant_noise,
    size_report,
    write_model_card,
)
from hf_quantnoise.publishing.tables import table
from hf_quantnoise.publishing.tasks import auto_class_of

FIXTURE = Path(__file__).parent / "card.md"
FULL = QuantNoiseCard(
    repo_id="me/small",
    base_model="google-bert/bert-base-uncased",
    dataset="GLUE SST-2",
    dataset_id="nyu-mll/glue",
    before={"eval_loss": 0.31, "eval_accuracy": 0.925, "eval_runtime": 3.5},
    after={"eval_loss": 0.33, "eval_accuracy": 0.915, "eval_runtime": 3.6, "epoch": 1.0},
    noise=QuantNoiseConfig(noise=["pq", "int8"], p=[0.1, 0.2], block_size=4, share_layers=2),
    training={"learning_rate": 5e-5, "num_train_epochs": 2.0, "seed": 42},
    compression={"stage_epochs": 1.0, "distill": True},
    history=[
        {"stage": "dense", "layers": 0, "relative_error": 0.0, "mb": 438.0,
         "metric": {"eval_accuracy": 0.925}},
        {"stage": "ffn", "layers": 4, "relative_error": 0.25, "mb": 0.0512, "metric": {}},
    ],
)  # fmt: skip


@pytest.fixture
def packed():
    return AutoQuantizedModel.from_pretrained(GOLDEN / "shared")


def without_versions(text):
    return re.sub(r"^- (hf_quantnoise|transformers|torch): `.*`$", r"- \1: `...`", text, flags=re.M)


def test_render_matches_the_stored_card(packed):
    # To update: FIXTURE.write_text(without_versions(str(FULL.render(packed)))), review the diff.
    assert without_versions(str(FULL.render(packed))) == FIXTURE.read_text()


def test_render_metadata_can_be_loaded(packed, tmp_path):
    FULL.render(packed).save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.tags == ["quant-noise", "import-hf_quantnoise"]
    assert (data.base_model_relation, data.pipeline_tag) == ("quantized", "text-classification")
    (result,) = data.eval_results  # neither the loss nor timings
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.915)
    assert (result.dataset_type, result.dataset_name) == ("nyu-mll/glue", "GLUE SST-2")


@pytest.mark.parametrize("field", ["base_model", "dataset_id", "after"])
def test_wrong_types_are_named(field):
    with pytest.raises(TypeError, match=f"invalid {field}: got list"):
        QuantNoiseCard(**{field: ["a/b", "c/d"]})


def test_table_escapes_bars_in_cells():
    row = table(("stage", "MB"), [(r".*(pooler|classifier)", 1)]).splitlines()[-1]
    assert re.split(r"(?<!\\)\|", row)[1:-1] == [r" .\*(pooler\|classifier) ", " 1 "]


def test_storage_table_adds_up_to_the_size_report(packed):
    section = FULL.render(packed).text.split("## Storage")[1].split("\n\n")[1]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines()[2:]]
    total = size_report(packed).total
    file = (GOLDEN / "shared" / "model.safetensors").stat().st_size
    assert total.disk_bytes == pytest.approx(file, rel=0.05)  # the file has one of three sentinels
    dense = sum(float(row[-2]) for row in rows if row[0] != "file header")
    assert dense == pytest.approx(total.dense_bytes / 1e6, abs=1e-4 * len(rows) / 2)
    compressed = sum(float(row[-1]) for row in rows)
    assert compressed == pytest.approx(total.disk_bytes / 1e6, abs=1e-4 * len(rows) / 2)


def test_render_omits_unknown_facts(packed):
    card = QuantNoiseCard().render(packed)
    values = card.data.to_dict()
    for name in ("base_model", "base_model_relation", "model-index", "metrics", "datasets"):
        assert name not in values
    text = re.sub(r"\*.*?\*", "", card.text.split("## Citation")[0])  # without the paper's title
    for words in (
        *("accuracy", "Compression stages", "Quantization noise"),
        *("Training", "None", "Measured"),
    ):
        assert words not in text, words
    assert "import hf_quantnoise" in card.text and "times smaller" in card.text


def test_write_model_card_keeps_text_of_the_user(packed, tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: mit\ntags:\n- mine\n---\n\nWords of mine.\n")
    assert write_model_card(packed, tmp_path, FULL) == str(path)
    first = path.read_text()
    path.write_text(first.replace("<!-- hf_quantnoise -->", "Above.\n\n<!-- hf_quantnoise -->"))
    write_model_card(packed, tmp_path, QuantNoiseCard(title="another"))
    card = ModelCard(path.read_text())
    assert card.data.license == "mit" and {"mine", "quant-noise"} <= set(card.data.tags)
    text = card.text
    assert text.index("Above.") < text.index("# another") < text.index("Words of mine.")
    assert "# small" not in text
    again = path.read_text()
    write_model_card(packed, tmp_path, QuantNoiseCard(title="another"))
    assert path.read_text() == again


def test_write_model_card_drops_metrics_of_another_model(packed, tmp_path):
    """If a folder is written again, and if the model was dequantized."""
    path = tmp_path / "README.md"
    write_model_card(packed, tmp_path, FULL)
    write_model_card(packed, tmp_path)
    assert "accuracy" not in path.read_text()
    packed.quantnoise_card = FULL
    packed.dequantize()
    write_model_card(packed, tmp_path)
    card = ModelCard(path.read_text())
    assert "accuracy" not in str(card) and "import" not in "".join(card.data.tags)
    assert "base_model_relation" not in card.data.to_dict()


def test_render_of_a_dense_model_does_not_mention_the_import():
    model = apply_quant_noise(make_model("bert"), QuantNoiseConfig())
    card = QuantNoiseCard(noise=QuantNoiseConfig(), base_model="a/b").render(model)
    assert "import hf_quantnoise" not in card.text and card.data.tags == ["quant-noise"]
    assert "finetuned with quantization noise" in card.text and "smaller" not in card.text
    assert card.data.base_model == "a/b" and "base_model_relation" not in card.data.to_dict()


def test_plot_is_copied_and_shown(packed, tmp_path):
    plot = tmp_path / "run" / "plots" / "stages.png"
    card = QuantNoiseCard(plot=str(plot))
    assert "![" not in Path(write_model_card(packed, tmp_path / "out", card)).read_text()
    plot.parent.mkdir(parents=True)
    plot.write_bytes(b"a picture")
    text = Path(write_model_card(packed, tmp_path / "out", card)).read_text()
    (shown,) = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert (tmp_path / "out" / shown).read_bytes() == b"a picture"


def test_saved_folder_has_the_plot_of_the_compression_run(parity_data, tmp_path):
    pytest.importorskip("matplotlib")
    trainer = make_trainer(tmp_path / "run", make_model("bert"), parity_data, max_steps=1)
    settings = CompressionArguments(stage_epochs=0)
    trainer.compress(IPQConfig(n_centroids=16), settings)
    for folder in ("saved", "run"):
        trainer.save_model(tmp_path / folder)
        text = (tmp_path / folder / "README.md").read_text()
        (shown,) = re.findall(r"!\[.*?\]\((.*?)\)", text)
        assert (tmp_path / folder / shown).read_bytes()[1:4] == b"PNG"


def test_card_metrics_are_dropped_by_training_until_the_next_evaluation(parity_data, tmp_path):
    parts = {"eval_dataset": parity_data, "compute_metrics": lambda prediction: {"score": 0.5}}
    trainer = make_trainer(tmp_path, make_model("bert"), parity_data, parts=parts, max_steps=1)
    small = trainer.compress(
        IPQConfig(n_centroids=16), CompressionArguments(stage_epochs=0, plots=False)
    )
    history = trainer.compression_history
    assert small.quantnoise_card.before == history[0]["metric"]
    assert small.quantnoise_card.after == history[-1]["metric"]
    trainer.train()
    assert small.quantnoise_card.after == {}
    trainer.evaluate(parity_data.select([0]))
    assert small.quantnoise_card.after == {}, "not evaluated on the trainer's dataset"
    metrics = trainer.evaluate()
    assert small.quantnoise_card.after["eval_score"] == metrics["eval_score"]
    trainer.save_model(tmp_path / "saved")
    assert "| score | 0.5000 | 0.5000 |" in (tmp_path / "saved" / "README.md").read_text()


class RecordUsed(TrainerCallback):
    """Records the settings that training actually used."""

    def __init__(self):
        self.used = {}

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        (self.used["learning_rate"],) = {group["lr"] for group in optimizer.param_groups}
        self.used["steps"] = state.global_step
        self.used["epochs"] = state.epoch


@pytest.mark.parametrize("length", [{"max_steps": 2}, {"num_train_epochs": 2.0}], ids=str)
def test_card_lists_the_settings_that_training_used(parity_data, tmp_path, length):
    model, recorder, batch_sizes = make_model("bert"), RecordUsed(), set()
    model.register_forward_pre_hook(
        lambda module, args, kwargs: batch_sizes.add(len(kwargs["input_ids"])), with_kwargs=True
    )
    settings = {"learning_rate": 3e-4, "lr_scheduler_type": "constant", "seed": 7, **length}
    trainer = make_trainer(
        tmp_path, model, parity_data.select(range(12)), QuantNoiseConfig(noise="int4", p=0.25),
        parts={"callbacks": [recorder]}, per_device_train_batch_size=6, **settings,
    )  # fmt: skip
    trainer.train()
    (batch_size,) = batch_sizes
    used, seed = recorder.used, torch.initial_seed()
    trainer.compress(IPQConfig(n_centroids=16), CompressionArguments(stage_epochs=0, plots=False))
    trainer.save_model(tmp_path / "saved")
    text = (tmp_path / "saved" / "README.md").read_text()
    section = text.split("## Training\n")[1].split("\n## ")[0]
    listed = dict(re.findall(r"^- (\w+): `(.*)`$", section, flags=re.M))
    assert float(listed["learning_rate"]) == used["learning_rate"] == 3e-4
    assert int(listed["per_device_train_batch_size"]) == batch_size == 6
    assert int(listed["seed"]) == seed == 7
    lengths = {"max_steps": used["steps"], "num_train_epochs": used["epochs"]}
    (name,) = length
    assert float(listed[name]) == lengths[name] == 2
    assert not (lengths.keys() - {name}) & listed.keys(), "the length that was not set"
    assert "Finetuned with `int4` at rate 0.25." in text
    assert "- stage_epochs: `0`" in text


@pytest.mark.parametrize(
    ("make", "auto_class"),
    [
        (lambda: make_model("bert"), "AutoModelForSequenceClassification"),
        (lambda: make_model("bert-mlm"), "AutoModelForMaskedLM"),
        (lambda: make_model("gpt2"), "AutoModelForCausalLM"),
        (lambda: make_stacked("t5"), "AutoModelForSeq2SeqLM"),
        (lambda: make_stacked("bart"), "AutoModelForSeq2SeqLM"),
        (lambda: make_vision_model("resnet"), "AutoModelForImageClassification"),
        (lambda: make_model("bert").bert, "AutoModel"),
        (lambda: type("Custom", (transformers.BertModel,), {})(make_model("bert").config), None),
    ],
)
def test_auto_class_of_returns_the_class_that_creates_the_model(make, auto_class):
    assert auto_class_of(make()) == auto_class
