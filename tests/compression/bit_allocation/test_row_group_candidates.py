"""Candidates of tables in groups of rows, and allocations that use them."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_quantnoise import IPQConfig, allocate_bits, count_lookups, quantize_model
from hf_quantnoise.compression import check_plan
from hf_quantnoise.compression.bit_allocation.candidates import candidates_for
from hf_quantnoise.modeling import packed_layers
from hf_quantnoise.quantizers import RowGroupQuantizer, quantizer_from_dict
from hf_quantnoise.structure import find_layers

ROWS = 2000
NAME = "bert.embeddings.word_embeddings"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        vocab_size=ROWS, max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


@pytest.fixture(scope="module")
def batches():
    weights = 1.0 / (torch.randperm(ROWS, generator=torch.Generator().manual_seed(0)) + 1.0) ** 1.3
    ids = torch.multinomial(weights, 4096, True, generator=torch.Generator().manual_seed(1))
    return [{"input_ids": part} for part in ids.view(8, 16, 32)]


def weighted_error(matrix, quantized, counts):
    errors = (matrix - quantized).double().square().sum(1) * (counts + 1)
    return float(errors.sum() / (matrix.double().square().sum(1) * (counts + 1)).sum())


def test_errors_are_those_of_the_fitted_table_weighted_by_lookups(model, batches):
    config = IPQConfig(target_size_mb=0.1, frequent_rows=200)
    lookups = count_lookups(model, batches)
    (layer,) = [layer for layer in find_layers(model) if layer.name == NAME]
    found = candidates_for((layer,), config, lookups=lookups[NAME])
    matrix, counts = layer.module.weight.detach(), lookups[NAME]
    checked = set()
    for candidate in found.candidates[1:]:
        quantizer = quantizer_from_dict(candidate.settings)
        grouped = isinstance(quantizer, RowGroupQuantizer)
        sizes = getattr(quantizer, "block_sizes", None) or getattr(quantizer, "block_size", 1)
        if getattr(quantizer, "n_centroids", 64) != 64 or sizes not in ((4, 16), (8, 32), 4, 8):
            continue
        checked.add(sizes)
        init = {"row_groups": quantizer.row_groups_of(counts)} if grouped else None
        state = quantizer.fit(matrix, init=init)
        error = weighted_error(matrix, quantizer.quantize(matrix, state), counts)
        assert candidate.error == pytest.approx(error, rel=0.1), quantizer
        assert candidate.quantizer is not None and candidate.state is not None
    assert checked == {(4, 16), (8, 32), 4, 8}


@pytest.mark.parametrize("frequent", [200, 0.9])
def test_allocation_gives_frequent_words_smaller_blocks(frequent, model, batches, tmp_path):
    config = IPQConfig(
        target_size_mb=0.045, frequent_rows=frequent, stages=["ffn", "embeddings", "attention"],
        codebook_bits=16,
    )  # fmt: skip
    check_plan(model, config)
    allocated = allocate_bits(model, config, batches, progress=False)
    settings = allocated.layer_quantizers[NAME]
    assert settings["scheme"] == "row_groups"
    frequent_size, rare_size = settings["block_sizes"]
    assert frequent_size < rare_size
    before = model.state_dict()
    small = quantize_model(
        type(model)(model.config), config, progress=False, calibration_data=batches
    )
    small.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size <= 45_000
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert isinstance(dict(packed_layers(small))[NAME].quantizer, RowGroupQuantizer)


def test_allocation_without_lookups_raises(model):
    config = IPQConfig(target_size_mb=0.1, frequent_rows=200)
    with pytest.raises(ValueError, match=r"no lookups of bert\.embeddings\.word_embeddings"):
        allocate_bits(model, config, progress=False)
