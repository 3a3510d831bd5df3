"""ONNX export: onnxruntime computes the packed model's logits, and the file holds codes."""

import json
import math

import pytest
import torch
from support.stored import tensors_of
from support.tiny import VOCABULARY, make_model, make_vision_model

from hf_quantnoise import FixedPointConfig, IPQConfig, export_onnx, quantize_model, size_report

LAYER = "bert.encoder.layer.{}.dense"
# One model with every storage format, since an export takes seconds.
CONFIG = IPQConfig(
    block_size=4,
    n_centroids=16,
    codebook_bits=16,
    activation_bits=8,
    layer_quantizers={
        LAYER.format("0.intermediate"): {"scheme": "int", "bits": 8, "observer": "channel"},
        LAYER.format("1.intermediate"): {"scheme": "int", "bits": 3},
        LAYER.format("0.output"): {
            "scheme": "pq", "block_size": 4, "n_centroids": 31, "codebook_bits": 8,
        },
        LAYER.format("1.output"): {
            "scheme": "additive", "block_size": 8, "n_centroids": 16, "row_scale": True,
        },
        "bert.embeddings.word_embeddings": {
            "scheme": "row_groups", "group_rows": [120, 200], "block_sizes": [4, 8],
            "n_centroids": 16, "codebook_bits": 8,
        },
    },
)  # fmt: skip


SHAPES = ((2, 8), (1, 1), (5, 33))  # rows, tokens


def batch(rows, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, length // 2 + 1 :] = 0
    types = torch.randint(0, 2, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def require(*names):
    for name in names:
        pytest.importorskip(name, reason="needs the extra 'onnx'")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return the packed model, its logits before the export, and the export."""
    require("onnx", "onnxscript")
    model = make_model("bert")
    model = quantize_model(model, CONFIG, calibration_data=[batch(3, 11)], progress=False)
    classes = [type(module) for module in model.modules()]
    with torch.no_grad():
        logits = model(**batch(2, 8)).logits
    result = export_onnx(model, tmp_path_factory.mktemp("onnx") / "out")
    assert [type(module) for module in model.modules()] == classes
    return model, logits, result


def assert_same_logits(model, result, batches, **options):
    """Assert that onnxruntime computes the packed model's logits."""
    require("onnxruntime")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(result.file), **options)
    assert tuple(value.name for value in session.get_inputs()) == result.inputs
    for inputs in batches:
        with torch.no_grad():
            logits = model(**inputs).logits
        found = session.run(["logits"], {k: v.numpy() for k, v in inputs.items()})[0]
        torch.testing.assert_close(torch.from_numpy(found), logits, rtol=0, atol=1e-4)


def assert_packed(model, result):
    """Assert that the file holds codes and codebooks, and no dense matrix in addition."""
    import onnx

    assert result.disk_bytes == result.file.stat().st_size
    graph = onnx.load(str(result.file)).graph
    report = size_report(model)
    stored = report.total.disk_bytes - report.header_bytes
    stored += sum(buffer.nbytes for buffer in model.buffers() if type(buffer) is torch.Tensor)
    # The excess is less than one 32 x 32 matrix, so no weight was folded into a dense one.
    assert sum(len(tensor.raw_data) for tensor in graph.initializer) < stored + 4 * 32 * 32
    codes = [t for t in graph.initializer if t.data_type == onnx.TensorProto.UINT8]
    packed = {p.numel() for n, p in tensors_of(model).items() if n.endswith("weight_indices")}
    assert packed <= {math.prod(tensor.dims) for tensor in codes}


@pytest.mark.parametrize("off", [[], ["ConstantFolding"]], ids=["decoded once", "in each run"])
def test_export_onnx_gives_the_same_logits_in_onnxruntime(exported, off):
    model, _, result = exported
    assert_same_logits(model, result, [batch(*shape) for shape in SHAPES], disabled_optimizers=off)


def test_export_onnx_stores_codes_and_codebooks(exported):
    model, _, result = exported
    assert_packed(model, result)


def test_export_onnx_writes_the_config_and_does_not_change_the_model(exported):
    model, logits, result = exported
    config = json.loads((result.folder / "config.json").read_text())
    assert "quantization_config" not in config and config["model_type"] == "bert"
    assert config["transformers.js_config"] == {"dtype": "fp32"}
    assert model.config.quantization_config.plan
    with torch.no_grad():
        assert torch.equal(model(**batch(2, 8)).logits, logits)


@pytest.mark.parametrize(
    ("make", "config", "match"),
    [
        (lambda: make_model("bert"), None, "BertForSequenceClassification"),
        (lambda: make_vision_model("resnet"), FixedPointConfig(bits=4), "pixel_values.*inputs="),
    ],
    ids=["dense", "unknown shape"],
)
def test_export_onnx_raises_if_the_model_is_not_supported(tmp_path, make, config, match):
    require("onnx", "onnxscript")
    model = make() if config is None else quantize_model(make(), config, progress=False)
    with pytest.raises(ValueError, match=match):
        export_onnx(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
