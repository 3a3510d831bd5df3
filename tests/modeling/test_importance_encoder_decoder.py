"""Importance of inputs in encoder-decoder models: their padding does not count."""

import pytest
import torch
import torch.nn.functional as F
from support.stacked import make_stacked
from transformers import (
    BartForSequenceClassification,
)

from hf_quantnoise.modeling.importance import measure_importance

ENCODER_DECODER = {
    "t5": {
        "encoder": "encoder.block.1.layer.0.SelfAttention.q",
        "decoder": "decoder.block.1.layer.0.SelfAttention.q",
        "cross-attention": "decoder.block.1.layer.1.EncDecAttention.k",
        "shared table": "shared",
    },
    "bart": {
        "encoder": "model.encoder.layers.1.fc1",
        "decoder": "model.decoder.layers.1.fc1",
        "cross-attention": "model.decoder.layers.1.encoder_attn.v_proj",
        "shared table": "model.shared",
    },
}


def padded_pair():
    """Return a batch, and the same examples one by one without padding. Sources and targets have
    the same width but different padding."""
    generator = torch.Generator().manual_seed(7)
    ids, targets = torch.randint(5, 320, (2, 3, 8), generator=generator)
    widths = [(8, 5), (4, 8), (6, 6)]
    batch = {"input_ids": ids, "labels": targets, "attention_mask": torch.ones_like(ids)}
    alone = []
    for row, (source, target) in enumerate(widths):
        alone.append(
            {"input_ids": ids[row : row + 1, :source].clone(),
             "labels": targets[row : row + 1, :target].clone()}
        )  # fmt: skip
        ids[row, source:], batch["attention_mask"][row, source:] = 0, 0
        targets[row, target:] = -100
    return batch, alone


@pytest.mark.parametrize("given", ["labels", "ids and labels", "ids and a mask"])
@pytest.mark.parametrize("name", ENCODER_DECODER)
def test_padding_of_encoder_and_decoder_is_ignored(name, given):
    model = make_stacked(name, 2)
    batch, alone = padded_pair()
    if given != "labels":
        batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    if given == "ids and a mask":
        batch["decoder_attention_mask"] = (batch.pop("labels") != -100).long()
    for which, layer in ENCODER_DECODER[name].items():
        weights = [[model.get_submodule(layer)]]
        found, expected = (measure_importance(model, weights, b)[0] for b in ([batch], alone))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=which)
        assert found.std() > 1e-3  # not constant


def test_decoder_of_classifier_has_mask_of_encoder():
    torch.manual_seed(0)
    model = BartForSequenceClassification(make_stacked("bart", 2).config).eval()
    ids = torch.randint(5, 320, (1, 8))
    ids[:, -1] = model.config.eos_token_id
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padded = {name: F.pad(value, (0, 4)) for name, value in batch.items()}
    layer = model.model.decoder.layers[1].fc1
    found, expected = (measure_importance(model, [[layer]], [b])[0] for b in (padded, batch))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
