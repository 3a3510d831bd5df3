"""Gradient accumulation: loss and gradient are those of one batch of all examples."""

import pytest
import torch
from support.tiny import make_model
from support.trainers import make_trainer
from torch.nn.functional import cross_entropy
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)
from transformers.loss.loss_utils import LOSS_MAPPING

from hf_quantnoise.compression.training.loss_normalization import loss_reads_num_items

EXAMPLES = 16
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 32, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
MULTI_LABEL, SINGLE_LABEL = "multi_label_classification", "single_label_classification"


def images(**labels):
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**SMALL, image_size=16, patch_size=8, **labels))


def sounds():
    torch.manual_seed(0)
    dropouts = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout",
                "final_dropout", "layerdrop", "mask_time_prob")  # fmt: skip
    config = Wav2Vec2Config(
        vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, conv_dim=(8, 8), conv_stride=(5, 4), conv_kernel=(10, 8),
        num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        ctc_loss_reduction="mean", ctc_zero_infinity=True, pad_token_id=0,
        **dict.fromkeys(dropouts, 0),
    )  # fmt: skip
    return Wav2Vec2ForCTC(config)


def rows(name, shape, label):
    generator = torch.Generator().manual_seed(0)
    return [
        {name: torch.randn(shape, generator=generator), "labels": label(row)}
        for row in range(EXAMPLES)
    ]


def image_rows(label):
    return rows("pixel_values", (3, 16, 16), label)


def classes(row):
    return torch.tensor([1.0, 0.0, row % 2])


HEADS = {
    "single-label": (lambda: images(num_labels=3), image_rows(lambda row: row % 3)),
    "known single-label": (
        lambda: images(num_labels=3, problem_type=SINGLE_LABEL), image_rows(lambda row: row % 3),
    ),
    "multi-label": (lambda: images(num_labels=3), image_rows(classes)),
    "known multi-label": (
        lambda: images(num_labels=3, problem_type=MULTI_LABEL), image_rows(classes),
    ),
    "regression": (lambda: images(num_labels=1), image_rows(lambda row: torch.tensor(row / 4))),
    "CTC": (sounds, rows("input_values", (800,), lambda row: torch.arange(row, row + 5) % 11 + 1)),
    "next token": (
        lambda: make_model("gpt2"),
        # Micro-batches differ in how many labels they have; all labels count alike.
        [{"input_ids": ids, "labels": ids.where(torch.arange(8) < 2 + row // 3, -100)}
         for row in range(EXAMPLES) if (ids := torch.arange(row, row + 8)) is not None],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_accumulated_loss_is_that_of_one_batch(name, tmp_path):
    make, data = HEADS[name]
    logs = []
    for steps in (1, 4):
        model = make()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer = make_trainer(
            tmp_path, model, data, max_steps=1, logging_steps=1, optim="sgd",
            gradient_accumulation_steps=steps, per_device_train_batch_size=EXAMPLES // steps,
        )  # fmt: skip
        trainer.train()
        logs.append(trainer.state.log_history[0])
    for key in ("loss", "grad_norm"):
        assert logs[1][key] == pytest.approx(logs[0][key], rel=1e-3), key


def counted(outputs, labels, num_items_in_batch=None, **kwargs):
    return cross_entropy(outputs, labels, reduction="sum") / num_items_in_batch


def looked_up(outputs, labels, **kwargs):
    return cross_entropy(outputs, labels, reduction="sum") / kwargs["num_items_in_batch"]


def plain(outputs, labels, **kwargs):
    return cross_entropy(outputs, labels)


@pytest.mark.parametrize(("loss", "reads"), [(counted, True), (looked_up, True), (plain, False)])
def test_own_loss_function_is_read(loss, reads):
    model = images(num_labels=3)
    model.loss_function = loss
    assert loss_reads_num_items(model) is reads


READING = {"ForCausalLM", "ForMaskedLM", "ForQuestionAnswering", "ForTokenClassification"}
READING |= {"ForConditionalGeneration", "CsmForConditionalGeneration"}


@pytest.mark.parametrize("problem", [SINGLE_LABEL, MULTI_LABEL, None])
def test_losses_of_transformers_are_read(problem):
    model, reading = images(num_labels=3, problem_type=problem), set()
    for model.loss_type in LOSS_MAPPING:
        if loss_reads_num_items(model):
            reading.add(model.loss_type)
    kinds = ("Sequence", "Image", "Video", "Audio") if problem == SINGLE_LABEL else ()
    assert reading == READING | {f"For{kind}Classification" for kind in kinds}


def test_unreadable_forward_is_averaged_over_micro_batches(monkeypatch):
    model = make_model("gpt2")
    assert loss_reads_num_items(model)
    monkeypatch.setattr(type(model), "forward", len)
    assert not loss_reads_num_items(model)
