"""The teacher of the GLUE studies: logits of the model, each example computed once."""

import torch
from remembered_teacher import RememberedTeacher
from transformers import BertConfig, BertForSequenceClassification


def batch(*rows):
    """Pad rows of token ids."""
    ids = [torch.tensor(row) for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    masks = [torch.ones_like(row) for row in ids]
    return {"input_ids": pad(ids, batch_first=True), "attention_mask": pad(masks, batch_first=True)}


def test_logits_are_those_of_the_model_and_computed_once():
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    computed = []
    model.register_forward_pre_hook(
        lambda module, args, inputs: computed.append(len(inputs["input_ids"])), with_kwargs=True
    )
    teacher = RememberedTeacher(model)
    batches = [batch([5, 6, 7], [8]), batch([8], [5, 6, 7], [9, 10, 11, 12, 13]), batch([8], [8])]
    with torch.no_grad():
        found = [teacher(**inputs).logits for inputs in batches]
        assert computed == [2, 1]
        expected = [model(**inputs).logits for inputs in batches]
    for logits, direct in zip(found, expected, strict=True):
        torch.testing.assert_close(logits, direct, rtol=1e-4, atol=1e-5)
