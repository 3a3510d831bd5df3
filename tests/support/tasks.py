"""A tiny model, a few padded examples and the expected divergence of each task."""

import torch
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)

from support.stacked import make_stacked
from support.tiny import IMAGE_SIZE, SIZES, make_model, make_vision_model

WIDTH = 8
EXAMPLES = 16


def _bert(kind, **fields):
    def make():
        torch.manual_seed(0)
        return kind(BertConfig(**SIZES, **fields)).eval()

    return make


def _tokens() -> dict[str, torch.Tensor]:
    """Return ids of 4 to 8 tokens, padded on the right."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 320, (EXAMPLES, WIDTH), generator=generator)
    lengths = torch.randint(4, WIDTH + 1, (EXAMPLES, 1), generator=generator)
    mask = (torch.arange(WIDTH) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def _with(labels):
    def make():
        batch = _tokens()
        return {**batch, **labels(batch)}

    return make


def _next_tokens(batch):
    return {"labels": torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)}


def _every_third(batch):
    labels = _next_tokens(batch)["labels"].clone()
    labels[:, torch.arange(WIDTH) % 3 != 1] = -100
    return {"labels": labels}


def _pixels():
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(EXAMPLES, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return {"pixel_values": pixels, "labels": torch.arange(EXAMPLES) % 2}


def _classes(batch):
    return {"labels": torch.arange(EXAMPLES) % 2}


def _numbers(batch):
    return {"labels": torch.linspace(-1, 1, EXAMPLES)}


def _several(batch):
    return {"labels": (torch.arange(EXAMPLES * 3).view(EXAMPLES, 3) % 2).float()}


def _tags(batch):
    labels = batch["input_ids"] % 3
    return {"labels": torch.where(batch["attention_mask"] == 1, labels, -100)}


def _span(batch):
    return {"start_positions": torch.arange(EXAMPLES) % 2, "end_positions": torch.full((16,), 3)}


# Task -> model, examples.
TASKS = {
    "classification": (lambda: make_model("bert"), _with(_classes)),
    "regression": (_bert(BertForSequenceClassification, num_labels=1), _with(_numbers)),
    "several labels": (_bert(BertForSequenceClassification, num_labels=3), _with(_several)),
    "causal LM": (lambda: make_model("gpt2"), _with(_next_tokens)),
    "masked LM": (lambda: make_model("bert-mlm"), _with(_every_third)),
    "tokens": (_bert(BertForTokenClassification, num_labels=3), _with(_tags)),
    "questions": (_bert(BertForQuestionAnswering), _with(_span)),
    "resnet": (lambda: make_vision_model("resnet"), _pixels),
    "vit": (lambda: make_stacked("vit"), _pixels),
    "t5": (lambda: make_stacked("t5"), _with(_next_tokens)),
    "bart": (lambda: make_stacked("bart"), _with(_next_tokens)),
}


def _kl(student, teacher, temperature):
    """Return the KL divergence of one row, term by term in float64."""
    s, t = (x.double() / temperature for x in (student, teacher))
    s, t = s - torch.log(torch.exp(s).sum()), t - torch.log(torch.exp(t).sum())
    return float((torch.exp(t) * (t - s)).sum()) * temperature**2


def _bernoulli(student, teacher, temperature):
    q, p = (1 / (1 + torch.exp(-x.double() / temperature)) for x in (student, teacher))
    terms = p * torch.log(p / q) + (1 - p) * torch.log((1 - p) / (1 - q))
    return float(terms.mean()) * temperature**2


def expected_divergence(task, student, teacher, batch, temperature):
    """Return the divergence by its definition: a loop over all rows that are not masked."""
    rows, values = range(EXAMPLES), []
    if task == "questions":
        for name in ("start_logits", "end_logits"):
            for i in rows:
                real = batch["attention_mask"][i].bool()
                values.append(_kl(student[name][i][real], teacher[name][i][real], temperature))
        return sum(values) / len(values)
    s, t = student["logits"], teacher["logits"]
    if task == "regression":
        return float((s.double() - t.double()).square().mean())
    if s.dim() == 2:
        of_row = _bernoulli if task == "several labels" else _kl
        values = [of_row(s[i], t[i], temperature) for i in rows]
        return sum(values) / len(values)
    ahead = 1 if task == "causal LM" else 0
    for i in rows:
        for position in range(WIDTH - ahead):
            if batch["labels"][i, position + ahead] != -100:
                values.append(_kl(s[i, position], t[i, position], temperature))
    return sum(values) / len(values)
