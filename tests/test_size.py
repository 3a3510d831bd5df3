"""size_report against the formula of section 3.3 and the bytes in memory."""

import math
import re
import sys
from dataclasses import asdict
from html import unescape

import pytest
import torch
from support.tiny import make_model

from hf_quantnoise import FixedPointConfig, IPQConfig, quantize_model, size_report


def row_of(report, name):
    return next(row for row in report.rows if row.name == name)


@pytest.mark.parametrize("bits", [32, 16, 8])
def test_formula_bytes_follow_section_3_3(bits):
    config = IPQConfig(block_size=8, n_centroids=16, codebook_bits=bits)
    report = size_report(quantize_model(make_model("bert"), config, progress=False))
    row = row_of(report, "bert.encoder.layer.0.intermediate.dense.weight")
    k, d, blocks = 16, 8, 64 * 32 // 8
    scales = 64 if bits == 8 else 0  # one scale and one zero point in float32
    assert row.formula_bytes == (bits * k * d + scales + math.log2(k) * blocks) / 8
    assert row.disk_bytes == row.formula_bytes  # half a byte per block, without padding
    assert row.dense_bytes == 4 * 64 * 32
    assert row.shape == (64, 32)
    assert "16" in row.stored and "8" in row.stored
    assert row.group == "ffn"


def test_memory_bytes_count_parameters_and_buffers():
    model = quantize_model(make_model("gpt2"), IPQConfig(n_centroids=16), progress=False)
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values()}
    expected = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert size_report(model).total.memory_bytes == expected


def test_tied_weights_are_counted_once(tied_model):
    dense = size_report(tied_model).total
    unique = {id(p): p for p in tied_model.parameters()}
    buffers = dict(tied_model.named_buffers())
    stored = [buffers[name] for name in tied_model.state_dict() if name in buffers]
    expected = sum(4 * p.numel() for p in unique.values())
    expected += sum(b.numel() * b.element_size() for b in stored)
    assert dense.dense_bytes == dense.memory_bytes == expected
    report = size_report(quantize_model(tied_model, IPQConfig(n_centroids=16), progress=False))
    assert sum(row.stored.startswith("tied to") for row in report.rows) >= 1


def test_int4_stores_two_codes_per_byte():
    model = quantize_model(make_model("bert"), FixedPointConfig(bits=4), progress=False)
    row = row_of(size_report(model), "bert.pooler.dense.weight")
    assert row.stored == "int4"
    assert row.disk_bytes == 32 * 32 // 2 + 8  # codes, then scale and zero point in float32


def test_dense_bytes_of_half_precision_are_float32():
    model = make_model("bert").to(torch.bfloat16)
    total = size_report(model).total
    assert total.dense_bytes == pytest.approx(2 * total.memory_bytes, rel=0.01)


def test_table_shows_groups_totals_and_dense_layers():
    model = quantize_model(make_model("bert"), IPQConfig(n_centroids=16), progress=False)
    text = str(size_report(model))
    for word in ("ffn", "embeddings", "attention", "total", "file header", "times smaller"):
        assert word in text
    assert "classifier: " in text and "'head'" in text


def test_size_report_to_pandas_has_the_rows_in_bytes():
    config = IPQConfig(n_centroids=16, kmeans_iter=1)
    report = size_report(quantize_model(make_model("bert"), config, progress=False))
    frame = report.to_pandas()
    assert frame.to_dict("records") == [asdict(row) for row in report.rows]
    total = report.total
    assert frame["disk_bytes"].sum() + report.header_bytes == total.disk_bytes
    assert frame["dense_bytes"].sum() == total.dense_bytes


def test_size_report_in_a_notebook_has_the_cells_of_the_table():
    report = size_report(make_model("bert"))
    report.left_dense["<script>"] = "a & b"
    html, text = report._repr_html_(), str(report)
    cells = list(map(unescape, re.findall("<t[dh][^>]*>([^<]*)</t[dh]>", html)))
    table, _, below = text.partition("\n" + report.closing_lines())
    assert [cell for cell in cells if cell] == re.split(r"\s{2,}|\n", table)
    assert below == "" and "<script>" not in html
    assert report.closing_lines() == unescape(re.search("<pre>([^<]*)</pre>", html)[1])


def test_to_pandas_without_pandas_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=re.escape("hf-quantnoise[pandas]")):
        size_report(torch.nn.Linear(2, 2)).to_pandas()
