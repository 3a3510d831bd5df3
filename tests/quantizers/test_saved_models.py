"""Models with additive codebooks and row scales: save and load are bit-equal, also after a step."""

import pytest
import torch
from support.stored import layers_of_stages
from support.tiny import make_model

from hf_quantnoise import IPQConfig, quantize_model, size_report

ADDITIVE, SCALED = {"block_size": 8, "n_codebooks": 2}, {"row_scale": True}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("bert", ADDITIVE),
        ("bert-mlm", {**ADDITIVE, **SCALED, "codebook_bits": 8}),
        ("gpt2", {**ADDITIVE, "codebook_bits": 16}),
        ("bert", SCALED),
        ("bert-mlm", {**SCALED, "codebook_bits": 8}),
        ("gpt2", {**SCALED, "codebook_bits": 16}),
    ],
    ids=str,
)
def test_model_save_load_is_bit_equal(name, fields, input_ids, tmp_path):
    config = IPQConfig(n_centroids=16, **fields)
    model = quantize_model(make_model(name), config, progress=False)
    layers = layers_of_stages(model)
    if "n_codebooks" in fields:
        assert layers and all(layer.weight_codebook.shape == (32, 8) for layer in layers)
        assert all(layer.rows_are_aligned for layer in layers)
    if "row_scale" in fields:
        assert all("weight_row_scale" in dict(layer.named_parameters()) for layer in layers)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model(input_ids).logits.square().mean().backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert any(n.endswith("row_scale" if "row_scale" in fields else "codebook") for n in moved)

    first, second = tmp_path / "first", tmp_path / "second"
    model.save_pretrained(first)
    loaded = type(model).from_pretrained(first)
    with torch.no_grad():
        expected = model(input_ids).logits
        assert torch.equal(loaded(input_ids).logits, expected)
    loaded.save_pretrained(second)
    for file in ("model.safetensors", "config.json"):
        assert (first / file).read_bytes() == (second / file).read_bytes()
    size = (first / "model.safetensors").stat().st_size
    report = size_report(loaded)
    assert abs(report.total.disk_bytes - size) <= 0.01 * size
    assert ("n_codebooks" in fields) == any("pq 2x16x8" in row.stored for row in report.rows)
    with torch.no_grad():
        torch.testing.assert_close(loaded.dequantize()(input_ids).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_model_save_load_is_bit_equal(dtype, input_ids, tmp_path):
    config = IPQConfig(n_centroids=16, row_scale=True)
    model = quantize_model(make_model("bert").to(dtype), config, progress=False)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)
