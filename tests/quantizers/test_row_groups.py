"""Tables in groups of rows, against each group quantized by itself, and in saved models."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.damage import edit_config, edit_tensors
from support.tiny import make_model
from support.trainers import make_trainer
from torch import nn

from hf_quantnoise import (
    AutoQuantizedModel,
    CompressionArguments,
    IPQConfig,
    quantize_model,
    size_report,
)
from hf_quantnoise.lookups import count_lookups, with_number_of_rows
from hf_quantnoise.modeling import pack_layer
from hf_quantnoise.quantizers import RowGroupQuantizer, quantizer_from_dict

ROWS, COLUMNS = 96, 32
KINDS = {
    "pq": {},
    "5 centroids": {"n_centroids": 5},  # rows are not aligned
    "8 bits, row scale": {"codebook_bits": 8, "row_scale": True},
    "16 bits": {"codebook_bits": 16},
    "additive": {"n_codebooks": 2, "codebook_bits": 8},
    "three groups": {"group_rows": (10, 30, 56), "block_sizes": (4, 8, 16)},
}


def quantizer_of(kind):
    default = {"group_rows": (40, 56), "block_sizes": (4, 8), "n_centroids": 16}
    return RowGroupQuantizer(**{**default, **KINDS[kind]})


def table(seed=0):
    torch.manual_seed(seed)
    return nn.Embedding(ROWS, COLUMNS)


def lookups():
    return torch.randint(0, 9, (ROWS,), generator=torch.Generator().manual_seed(1))


def expected_of(quantizer, matrix, counts):
    """Return the quantized matrix: rows ranked by (count, lower index), each group by itself."""
    ranked = sorted(range(ROWS), key=lambda row: (-int(counts[row]), row))
    result = torch.empty_like(matrix)
    for part, size in zip(quantizer.parts, quantizer.group_rows, strict=True):
        rows, ranked = sorted(ranked[:size]), ranked[size:]
        result[rows] = part.quantize(matrix[rows], part.fit(matrix[rows]))
    return result


@pytest.mark.parametrize("kind", KINDS)
class TestPackedTable:
    def test_decodes_each_group_in_the_original_order(self, kind):
        layer, quantizer = table(), quantizer_of(kind)
        expected = expected_of(quantizer, layer.weight.detach(), lookups())
        pack_layer(layer, quantizer, lookups=lookups())
        ids = torch.tensor([[5, 3, 3], [95, 0, 17]])
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                assert torch.equal(layer.weight, expected)
                assert torch.equal(layer(ids), expected[ids])
                assert torch.equal(layer.decode_rows(slice(10, 50)), expected[10:50])

    def test_bytes_are_those_of_the_formula(self, kind):
        layer, quantizer = table(), quantizer_of(kind)
        pack_layer(layer, quantizer, lookups=lookups())
        stored = quantizer.to_storage(layer.state)
        n_bytes = layer.weight_indices.nbytes + sum(tensor.nbytes for tensor in stored.values())
        assert n_bytes == quantizer.packed_bytes(ROWS, COLUMNS)
        books = sum(part.codebook_size * part.block_size for part in quantizer.parts)
        assert layer.weight_codebook.shape == (books,)

    def test_centroid_gradient_is_average_over_blocks(self, kind):
        layer, dense = table(), table()
        quantizer = quantizer_of(kind)
        pack_layer(layer, quantizer, lookups=lookups())
        dense.weight.data.copy_(layer.weight.detach())
        ids = torch.randint(0, ROWS, (4, 9), generator=torch.Generator().manual_seed(2))
        for each in (layer, dense):
            each(ids).square().sum().backward()
        groups, codes = quantizer.groups(layer.state), layer.codes()
        gradient = dense.weight.grad.double()
        if quantizer.row_scale:
            gradient = gradient * quantizer.parts[0].scales(layer.state).detach()
        found = layer.weight_codebook.grad.split(
            [part.codebook_size * part.block_size for part in quantizer.parts]
        )
        for group, part in enumerate(quantizer.parts):
            own = groups == group
            blocks = gradient[own].reshape(-1, part.block_size)
            pairs = codes[own, : COLUMNS // part.block_size * part.codes_per_block]
            pairs = pairs.reshape(len(blocks), -1).long()
            for book in range(part.codes_per_block):
                for centroid in range(part.n_centroids):
                    row = book * part.n_centroids + centroid
                    mine = blocks[pairs[:, book] == centroid]
                    mean = mine.mean(0) if len(mine) else torch.zeros(part.block_size).double()
                    actual = found[group].view(-1, part.block_size)[row].double()
                    torch.testing.assert_close(actual, mean, rtol=1e-4, atol=1e-5)

    def test_json_round_trip(self, kind):
        quantizer = quantizer_of(kind)
        assert quantizer_from_dict(json.loads(json.dumps(quantizer.to_dict()))) == quantizer


@pytest.mark.parametrize("row", [-1, ROWS])
def test_row_out_of_range_raises(row):
    layer = table()
    pack_layer(layer, quantizer_of("pq"), lookups=lookups())
    with pytest.raises(IndexError, match="out of range"):
        layer(torch.tensor([4, row]))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "do not divide its 96 rows"),
        ({"group_rows": (40, 50), "block_sizes": (4, 8)}, "do not divide its 96 rows"),
        ({"group_rows": (40, 56), "block_sizes": (4, 8, 16)}, "do not divide its 96 rows"),
        ({"group_rows": (40, 56), "block_sizes": (4, 5)}, "block size 5 does not divide"),
        ({"group_rows": (1, 95), "block_sizes": (4, 8)}, "group of 1 rows: it has only 8 blocks"),
    ],
)
def test_check_returns_the_reason(fields, reason):
    assert reason in RowGroupQuantizer(**fields, n_centroids=16).check(ROWS, COLUMNS)


# ---- models --------------------------------------------------------------------------------------

CONFIG = {
    "block_size": 4,
    "rare_block_size": 8,
    "n_centroids": 16,
    "frequent_rows": 100,
    "leftover_bits": 32,
}


def batch():
    ids = torch.randint(0, 320, (8, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, 12:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def quantized(name, **fields):
    config = IPQConfig(**{**CONFIG, **fields})
    return quantize_model(make_model(name), config, progress=False, calibration_data=[batch()])


@pytest.mark.parametrize("name", ["bert", "bert-mlm", "gpt2"])
@pytest.mark.parametrize(
    "fields", [{}, {"codebook_bits": 8, "row_scale": True}, {"n_centroids": 5}], ids=str
)
def test_model_save_load_is_bit_equal_after_training(name, fields, tmp_path):
    model = quantized(name, **fields)
    before = model.get_input_embeddings().weight_codebook.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model(**batch()).logits.square().mean().backward()
    optimizer.step()
    assert not torch.equal(model.get_input_embeddings().weight_codebook, before)
    first, second = tmp_path / "first", tmp_path / "second"
    model.save_pretrained(first)
    loaded = AutoQuantizedModel.from_pretrained(first)
    with torch.no_grad():
        expected = model(**batch()).logits
        assert torch.equal(loaded(**batch()).logits, expected)
    loaded.save_pretrained(second)
    for file in ("model.safetensors", "config.json"):
        assert (first / file).read_bytes() == (second / file).read_bytes()
    size = (first / "model.safetensors").stat().st_size
    assert size_report(loaded).total.disk_bytes == size_report(model).total.disk_bytes == size
    stored = json.loads((first / "config.json").read_text())["quantization_config"]
    assert (stored["format_version"], stored["requires"]) == (2, "hf-quantnoise>=0.2.0")
    with torch.no_grad():
        torch.testing.assert_close(loaded.dequantize()(**batch()).logits, expected)


def test_frequent_rows_are_those_of_the_data():
    model = quantized("bert")
    layer = model.get_input_embeddings()
    data = batch()
    counts = torch.bincount(data["input_ids"][:, :12].reshape(-1), minlength=320).tolist()
    ranked = sorted(range(320), key=lambda row: (-counts[row], row))
    groups = layer.quantizer.groups(layer.state)
    assert torch.nonzero(groups == 0).view(-1).tolist() == sorted(ranked[:100])


def test_share_of_lookups_becomes_a_number_of_rows():
    model = make_model("bert")
    counts = count_lookups(model, [batch()])
    config = with_number_of_rows(IPQConfig(frequent_rows=0.7), counts)
    ranked = torch.sort(next(iter(counts.values())), descending=True).values
    n_rows = config.frequent_rows
    assert ranked[:n_rows].sum() >= 0.7 * 96 > ranked[: n_rows - 1].sum()


def test_compress_counts_the_training_data(tmp_path):
    data = [{"input_ids": [7] * 9 + [5] * 5 + [3], "labels": 0} for _ in range(4)]
    trainer = make_trainer(tmp_path, make_model("bert"), data, None)
    config = IPQConfig(**{**CONFIG, "frequent_rows": 0.9, "n_centroids": 4})
    model = trainer.compress(config, CompressionArguments(stage_epochs=0))
    (entry,) = [
        entry
        for entry in model.config.quantization_config.plan.values()
        if entry["scheme"] == "row_groups"
    ]
    assert entry["group_rows"] == [2, 318]
    layer = model.get_input_embeddings()
    groups = layer.quantizer.groups(layer.state)
    assert torch.nonzero(groups == 0).view(-1).tolist() == [5, 7]


def test_table_with_frequent_rows_only_has_one_group():
    plan = quantized("bert", frequent_rows=320).config.quantization_config.plan
    assert {entry["scheme"] for entry in plan.values()} == {"pq"}


def test_missing_data_raises():
    with pytest.raises(ValueError, match="frequent_rows needs calibration data"):
        quantize_model(make_model("bert"), IPQConfig(**CONFIG), progress=False)
    without_ids = {"inputs_embeds": torch.zeros(1, 3, 32)}
    with pytest.raises(ValueError, match=r"no lookups of bert\.embeddings\.word_emb"):
        quantize_model(
            make_model("bert"), IPQConfig(**CONFIG), calibration_data=[without_ids], progress=False
        )


@pytest.mark.parametrize("value", [0, -3, 1.5, 0.0, "8000", True])
def test_invalid_frequent_rows_raise(value):
    with pytest.raises(ValueError, match="invalid frequent_rows"):
        IPQConfig(frequent_rows=value)


def test_files_that_contradict_themselves_are_refused(tmp_path):
    quantized("bert").save_pretrained(tmp_path)
    name = "bert.embeddings.word_embeddings"
    saved = load_file(tmp_path / "model.safetensors")[f"{name}.weight_row_groups"]
    edit_tensors(tmp_path, lambda tensors: tensors[f"{name}.weight_row_groups"].bitwise_not_())
    with pytest.raises(ValueError, match=r"weight_row_groups: got groups of \[220, 100\] rows"):
        AutoQuantizedModel.from_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({f"{name}.weight_row_groups": saved}))
    AutoQuantizedModel.from_pretrained(tmp_path)
    for change in ({"group_rows": [110, 210]}, {"block_sizes": [8, 4]}, {"group_rows": []}):

        def edit(config, change=change):
            config["plan"][name] |= change

        edit_config(tmp_path, edit)
        with pytest.raises(ValueError, match="invalid plan"):
            AutoQuantizedModel.from_pretrained(tmp_path)
