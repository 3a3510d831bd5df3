"""The blocking rule, and the groups, ties and selection of layers."""

import pytest
import torch
from support.tiny import make_model
from support.zoo import ZOO
from torch import nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from hf_quantnoise import size_report
from hf_quantnoise.blocks import to_blocks, weight_matrix
from hf_quantnoise.layer_types import layer_type_of
from hf_quantnoise.structure import (
    block_size_of,
    find_layers,
    select_layers,
    unsupported_weights,
)


def groups(model):
    return {layer.name: layer.group for layer in find_layers(model)}


def test_to_blocks_cuts_rows_into_consecutive_columns():
    matrix = torch.arange(24.0).view(3, 8)
    blocks = to_blocks(matrix, 4)
    assert blocks.shape == (6, 4)
    assert blocks[1].tolist() == matrix[0, 4:].tolist()
    assert blocks[2].tolist() == matrix[1, :4].tolist()


def test_to_blocks_with_indivisible_block_size_raises():
    with pytest.raises(ValueError, match=r"block_size=3.* 8 columns"):
        to_blocks(torch.zeros(2, 8), 3)


def test_blocks_of_transformers_conv1d_are_those_of_linear():
    torch.manual_seed(0)
    conv = Conv1D(12, 8)  # 8 inputs, 12 outputs
    linear = nn.Linear(8, 12)
    linear.weight.data.copy_(conv.weight.t())
    assert torch.equal(to_blocks(weight_matrix(conv), 4), to_blocks(weight_matrix(linear), 4))
    assert (
        layer_type_of(conv).from_matrix(weight_matrix(conv), conv.weight.shape).shape
        == conv.weight.shape
    )


def test_unknown_layer_type_raises():
    assert layer_type_of(nn.LayerNorm(4)) is None
    with pytest.raises(TypeError, match=r"LayerNorm.*Linear"):
        weight_matrix(nn.LayerNorm(4))


def test_groups_of_bert():
    found = groups(make_model("bert"))
    assert found["bert.embeddings.word_embeddings"] == "embeddings"
    assert found["bert.encoder.layer.1.attention.self.key"] == "attention"
    assert found["bert.encoder.layer.1.attention.output.dense"] == "attention"
    assert found["bert.encoder.layer.0.intermediate.dense"] == "ffn"
    assert found["bert.encoder.layer.0.output.dense"] == "ffn"
    assert found["bert.pooler.dense"] == found["classifier"] == "head"


def test_groups_of_gpt2():
    found = groups(make_model("gpt2"))
    assert found["transformer.wte"] == found["lm_head"] == "embeddings"
    assert found["transformer.h.0.attn.c_attn"] == "attention"
    assert found["transformer.h.0.attn.c_proj"] == "attention"
    assert found["transformer.h.1.mlp.c_proj"] == "ffn"


def test_tied_head_is_in_group_of_table(tied_model):
    layers = {layer.name: layer for layer in find_layers(tied_model)}
    table = next(layer for layer in layers.values() if layer.input_table)
    (head,) = table.ties
    assert layers[head].ties == (table.name,)
    assert layers[head].group == "embeddings"
    assert layers[head].module.weight is table.module.weight


def test_select_layers_matches_like_peft():
    model = make_model("bert")
    names = [layer.name for layer in select_layers(model, ["query", "classifier"])]
    assert names == [
        "bert.encoder.layer.0.attention.self.query",
        "bert.encoder.layer.1.attention.self.query",
        "classifier",
    ]
    names = [layer.name for layer in select_layers(model, r".*\.1\..*", [r"query"])]
    assert names and not any(name.endswith("query") for name in names)
    assert all(".1." in name for name in names)


def test_select_layers_keeps_tied_pairs_together():
    model = make_model("gpt2")
    assert [layer.name for layer in select_layers(model, ["wte"])] == ["transformer.wte", "lm_head"]
    left = [layer.name for layer in select_layers(model, None, ["lm_head"])]
    assert "lm_head" not in left and "transformer.wte" not in left


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize("pattern", ["nothing_here", ["query", "nothing_here"]])
def test_pattern_without_match_raises(field, pattern):
    with pytest.raises(ValueError) as error:
        select_layers(make_model("bert"), **{field: pattern})
    assert f"{field}='nothing_here'" in str(error.value)
    assert "word_embeddings" in str(error.value)


def test_target_modules_without_patterns_are_named():
    with pytest.raises(ValueError, match=r"invalid target_modules=\[\]: it selects no layer"):
        select_layers(make_model("bert"), [])


def test_model_without_known_layers_raises():
    with pytest.raises(ValueError, match="no layer of a known type"):
        select_layers(nn.Sequential(nn.LayerNorm(4)))


def test_block_size_prefers_regex_to_group():
    layers = {layer.name: layer for layer in find_layers(make_model("gpt2"))}
    sizes = {"attention": 4, r".*\.0\.attn\.c_attn": 2, "embeddings": 8, "lm_head": 16}
    assert block_size_of(sizes, layers["transformer.h.0.attn.c_attn"]) == 2
    assert block_size_of(sizes, layers["transformer.h.1.attn.c_attn"]) == 4
    assert block_size_of(sizes, layers["transformer.wte"]) == 16  # its tied partner is named
    assert block_size_of(sizes, layers["transformer.h.0.mlp.c_fc"]) is None
    assert block_size_of(8, layers["transformer.h.0.mlp.c_fc"]) == 8


def test_unsupported_weights_are_listed_and_large_ones_warned_of(caplog):
    model = nn.ModuleDict(
        {"attend": nn.MultiheadAttention(64, 2), "head": nn.Linear(64, 4), "norm": nn.LayerNorm(64)}
    )
    model.register_parameter("tokens", nn.Parameter(torch.zeros(1, 1, 64)))
    logging.get_logger("hf_quantnoise").propagate = True
    try:
        with caplog.at_level("WARNING", logger="hf_quantnoise"):
            others = unsupported_weights(model)
    finally:
        logging.get_logger("hf_quantnoise").propagate = False
    assert set(others) == {"attend.in_proj_weight", "tokens"}
    assert "bare parameter of MultiheadAttention" in others["attend.in_proj_weight"]
    assert "attend.in_proj_weight" in caplog.text and "tokens" not in caplog.text
    assert not unsupported_weights(make_model("bert"))


def test_unsupported_weights_have_reasons():
    model = nn.Sequential(
        nn.Linear(8, 8), nn.Conv3d(8, 8, 3), parametrizations.weight_norm(nn.Linear(8, 8))
    )
    others = unsupported_weights(model)
    assert "Conv3d is not a known layer type" in others["1.weight"]
    original_class = "2.parametrizations.weight.original1"
    assert "torch parametrization" in others[original_class]


def test_weight_without_values_is_not_a_layer():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 0))
    assert [layer.name for layer in find_layers(model)] == ["0"]
    assert unsupported_weights(model) == {"1.weight": "it has no values (0.0% of the weights)"}


def test_unsaved_table_is_not_a_layer_and_takes_no_bytes():
    model = ZOO["Marian"].make()
    name = "model.encoder.embed_positions"
    assert name not in {layer.name for layer in find_layers(model)}
    assert "in no checkpoint" in unsupported_weights(model)[f"{name}.weight"]
    (row,) = [row for row in size_report(model).rows if row.name == f"{name}.weight"]
    assert (row.stored, row.disk_bytes, row.dense_bytes) == ("computed", 0, 0)
    assert row.memory_bytes == 64 * 32 * 4
