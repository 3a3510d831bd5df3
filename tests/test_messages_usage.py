"""Error messages for mistakes in how models, data and layers are used."""

import pytest
import torch
from support.mistakes import SMALL, Mistake, check_message, compress, quantize, trainer
from support.tiny import SIZES, make_model
from torch import nn
from transformers import (
    IBertConfig,
    IBertForSequenceClassification,
    Seq2SeqTrainingArguments,
    TrainingArguments,
)

from hf_quantnoise import (
    AutoQuantizedModel,
    CompressionArguments,
    FixedPointConfig,
    IPQConfig,
    QuantNoiseConfig,
    QuantNoiseTrainer,
    apply_quant_noise,
    quantize_model,
)

QUERY = "bert.encoder.layer.0.attention.self.query"


def only_a_head():
    """A model whose only layer of a known type is its head: I-BERT defines the others itself."""
    return IBertForSequenceClassification(IBertConfig(**SIZES))


def excluding(**options):
    return IPQConfig(block_size=4, n_centroids=8, **options)


def assign_weight(name, value):
    model = quantize(SMALL)
    setattr(model.get_submodule(name), "weight", value)  # noqa: B010


def train_with(**data):
    return lambda folder: QuantNoiseTrainer(
        make_model("bert"), TrainingArguments(folder, use_cpu=True, report_to="none"), **data
    )


def evaluate_with_generate(folder):
    args = Seq2SeqTrainingArguments(folder, use_cpu=True, predict_with_generate=True)
    QuantNoiseTrainer(make_model("bert"), args)


def compress_without_examples(folder):
    own = trainer(folder)
    own.train_dataset = []
    own.compress(SMALL, CompressionArguments(stage_epochs=1, plots=False))


def load_with_other_labels(folder):
    quantize(SMALL).save_pretrained(folder)
    AutoQuantizedModel.from_pretrained(folder, num_labels=7)


MISTAKES = {
    "all layers excluded": Mistake(
        lambda folder: quantize(excluding(exclude_modules=".*")), "exclude_modules", "'.*'"
    ),
    "all layers excluded from noise": Mistake(
        lambda folder: apply_quant_noise(
            make_model("bert"), QuantNoiseConfig(exclude_modules=r".*\w")
        ),
        "exclude_modules",
    ),
    "target that is excluded": Mistake(
        lambda folder: quantize(
            excluding(target_modules=["query"], exclude_modules=r".*\.self\..*")
        ),
        "target_modules",
        "['query']",
    ),
    "target outside of the default stages": Mistake(
        lambda folder: quantize(excluding(target_modules=["classifier"])), "stages", "['head']"
    ),
    "model outside of the default stages": Mistake(
        lambda folder: quantize(SMALL, only_a_head()), "stages", "['head']"
    ),
    "file name as train_dataset": Mistake(
        train_with(train_dataset="train.csv"), "train_dataset", "'train.csv'"
    ),
    "file name as eval_dataset": Mistake(
        train_with(eval_dataset="dev.csv"), "eval_dataset", "'dev.csv'"
    ),
    "no examples": Mistake(compress_without_examples, "train_dataset"),
    "assigned weight": Mistake(
        lambda folder: assign_weight(QUERY, nn.Parameter(torch.zeros(32, 32))), "weight"
    ),
    "dequantized to integers": Mistake(
        lambda folder: quantize(SMALL).dequantize(dtype=torch.int8), "dtype", "torch.int8"
    ),
    "dequantized to an unknown dtype": Mistake(
        lambda folder: quantize(SMALL).dequantize(dtype="bf16"), "dtype", "'bf16'"
    ),
    "evaluation with generate": Mistake(
        evaluate_with_generate, "predict_with_generate", "predict_with_generate=True"
    ),
    "stage epochs as a text": Mistake(
        lambda folder: CompressionArguments(stage_epochs="1"), "stage_epochs", "'1'"
    ),
    "rate as a percentage": Mistake(lambda folder: QuantNoiseConfig(p="10%"), "p", "'10%'"),
    "size with a unit": Mistake(
        lambda folder: IPQConfig(target_size_mb="14MB"), "target_size_mb", "'14MB'"
    ),
    "block size as a float": Mistake(lambda folder: IPQConfig(block_size=8.0), "block_size", "8.0"),
    "bits as a text": Mistake(lambda folder: FixedPointConfig(bits="8"), "bits", "'8'"),
    "model in a list": Mistake(
        lambda folder: quantize_model([make_model("bert")], SMALL), "model", "list"
    ),
    "teacher that is a list": Mistake(
        lambda folder: compress(folder, teacher=[make_model("bert")]), "teacher", "list"
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_message_names_field_value_and_way_out(name, tmp_path):
    check_message(MISTAKES[name], tmp_path)


def test_labels_of_another_head_are_explained(tmp_path):
    with pytest.raises(ValueError, match="ignore_mismatched_sizes=True if you want a new head"):
        load_with_other_labels(tmp_path)


def test_model_stays_packed_if_the_dtype_is_invalid():
    model = quantize(SMALL)
    with pytest.raises(ValueError, match="invalid dtype"):
        model.dequantize(dtype=torch.int8)
    assert model.get_submodule(QUERY).weight_indices.dtype == torch.uint8
