"""Importance of tables that a model reads completely, and of all architectures of the zoo."""

import pytest
import torch
import torch.nn.functional as F
from support.trainers import make_trainer
from support.zoo import ZOO, rows_of
from torch import nn

from hf_quantnoise import CompressionArguments, IPQConfig, quantize_model
from hf_quantnoise.modeling import packed_layers, packer
from hf_quantnoise.modeling.importance import measure_importance


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class ReadsTable(nn.Module):
    """Reads all rows of a table in one of several ways, and never looks one up."""

    def __init__(self, read):
        super().__init__()
        self.table, self.read = nn.Embedding(10, 4), read

    def forward(self, inputs):
        return self.read(self.table.weight, inputs)


READS = {
    "layer norm": lambda weight, inputs: F.layer_norm(weight, (4,)),
    "head": lambda weight, inputs: F.linear(inputs, weight),
    "head, by keyword": lambda weight, inputs: F.linear(input=inputs, weight=weight),
    "product": lambda weight, inputs: inputs @ weight.t(),
    "list": lambda weight, inputs: torch.cat([inputs, weight]),
    "slice": lambda weight, inputs: weight[:3] + inputs,
}


@pytest.mark.parametrize("name", READS)
def test_table_read_as_a_whole_counts_every_row_once(name):
    model = ReadsTable(READS[name])
    (found,) = measure_importance(model, [[model.table]], [normal(3, 4)], model)
    assert torch.equal(found, torch.ones(10, 1))


@pytest.mark.parametrize("name", ["dtype", "shape", "nothing"])
def test_table_whose_values_are_not_read_is_refused(name):
    model = ReadsTable(lambda weight, inputs: inputs + len(str(getattr(weight, name, ""))))
    with pytest.raises(ValueError, match="importance: table never ran"):
        measure_importance(model, [[model.table]], [normal(3, 4)], model)


SPECIAL_TABLES = ("DeBERTa-v2", "MPNet", "T5", "Swin", "CLIP", "Whisper", "OPT")
# Mamba reads the weight of a layer that it never calls; it is refused before anything is packed.
REFUSED = {"Mamba": "dt_proj"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n in {*SPECIAL_TABLES, *REFUSED} else pytest.mark.slow, id=n)
        for n in ZOO
    ],
)
def test_zoo_importance_is_measured_or_refused_before_packing(name, monkeypatch):
    kind = ZOO[name]
    model, settings = kind.make(), IPQConfig(n_centroids=8, importance="activations", kmeans_iter=2)
    if name in REFUSED:
        monkeypatch.setattr(packer, "pack_layer", None)
        with pytest.raises(ValueError, match=rf"importance: .*{REFUSED[name]} never ran"):
            quantize_model(model, settings, False, [kind.batch()])
        assert not any(packed_layers(model))
        return
    quantize_model(model, settings, False, [kind.batch()])
    assert any(packed_layers(model))


def test_compress_weighs_relative_positions_of_deberta(tmp_path):
    kind = ZOO["DeBERTa-v2"]
    trainer = make_trainer(tmp_path, kind.make(), rows_of(kind.batch()))
    config = IPQConfig(n_centroids=8, importance="activations")
    trainer.compress(config, CompressionArguments(stage_steps=1))
    assert "deberta.encoder.rel_embeddings" in dict(packed_layers(trainer.model))
