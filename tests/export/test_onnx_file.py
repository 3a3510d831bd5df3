"""ONNX files: the packed model's logits from onnxruntime, and weights that are still codes."""

import json
import math

import pytest
import torch
from support.tiny import IMAGE_SIZE, VOCABULARY, make_model, make_vision_model
from support.zoo import ZOO, ipq_config

from hf_quantnoise import FixedPointConfig, IPQConfig, export_onnx, quantize_model, size_report

LAYER = "bert.encoder.layer.{}.dense"
# Every way of storing a weight in one model: an export takes seconds.
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
    },
)  # fmt: skip


SHAPES = ((2, 8), (1, 1), (5, 33))  # rows, tokens
OTHERS = (  # of the zoo
    "RoBERTa", "DistilBERT", "ALBERT", "DeBERTa-v2", "ELECTRA", "MPNet", "ModernBERT", "ViT",
)  # fmt: skip


def batch(rows, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, length // 2 + 1 :] = 0
    types = torch.randint(0, 2, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def need(*names):
    for name in names:
        pytest.importorskip(name, reason="needs the extra 'onnx'")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The packed model, what it answered before it was exported, and the export."""
    need("onnx", "onnxscript")
    model = make_model("bert")
    model = quantize_model(model, CONFIG, calibration_data=[batch(3, 11)], progress=False)
    classes = [type(module) for module in model.modules()]
    with torch.no_grad():
        logits = model(**batch(2, 8)).logits
    done = export_onnx(model, tmp_path_factory.mktemp("onnx") / "out")
    assert [type(module) for module in model.modules()] == classes
    return model, logits, done


def padded(model, done, shape):
    """A batch with padding in the ids too, by which RoBERTa and MPNet count positions."""
    inputs = batch(*shape)
    inputs["input_ids"][inputs["attention_mask"] == 0] = model.config.pad_token_id
    return {name: inputs[name] for name in done.inputs}


def batches(model, done):
    """Some batches of what the graph takes."""
    if done.inputs != ("pixel_values",):
        return [padded(model, done, shape) for shape in SHAPES]
    generator = torch.Generator().manual_seed(0)
    sizes = [(rows, 3, IMAGE_SIZE, IMAGE_SIZE) for rows, _ in SHAPES]
    return [{"pixel_values": torch.randn(size, generator=generator)} for size in sizes]


def assert_same_logits(model, done, batches, **options):
    """onnxruntime's, of the file, and the packed model's."""
    need("onnxruntime")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(done.file), **options)
    assert tuple(value.name for value in session.get_inputs()) == done.inputs
    for inputs in batches:
        with torch.no_grad():
            logits = model(**inputs).logits
        found = session.run(["logits"], {k: v.numpy() for k, v in inputs.items()})[0]
        torch.testing.assert_close(torch.from_numpy(found), logits, rtol=0, atol=1e-4)


def assert_packed(model, done):
    """Codes and codebooks are in the file, and no dense matrix beside what the model has."""
    import onnx

    assert done.disk_bytes == done.file.stat().st_size
    graph = onnx.load(str(done.file)).graph
    report = size_report(model)
    stored = report.total.disk_bytes - report.header_bytes
    stored += sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    # Less than one matrix of 32 x 32 more: none was folded into a dense one.
    assert sum(len(tensor.raw_data) for tensor in graph.initializer) < stored + 4 * 32 * 32
    codes = [t for t in graph.initializer if t.data_type == onnx.TensorProto.UINT8]
    held = {p.numel() for n, p in model.named_parameters() if n.endswith("weight_indices")}
    assert held <= {math.prod(tensor.dims) for tensor in codes}


@pytest.mark.parametrize("off", [[], ["ConstantFolding"]], ids=["decoded once", "in each run"])
def test_onnxruntime_computes_the_same_logits(exported, off):
    model, _, done = exported
    assert_same_logits(model, done, [batch(*shape) for shape in SHAPES], disabled_optimizers=off)


def test_the_file_holds_codes_and_codebooks(exported):
    model, _, done = exported
    assert_packed(model, done)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_encoders(name, tmp_path):
    need("onnx", "onnxscript")
    model = ZOO[name].make()
    model = quantize_model(model, ipq_config(model), progress=False)
    done = export_onnx(model, tmp_path)
    assert_same_logits(model, done, batches(model, done))
    assert_packed(model, done)


def test_labels_and_sizes_travel_along_and_the_model_is_left_as_it_was(exported):
    model, logits, done = exported
    config = json.loads((done.folder / "config.json").read_text())
    assert "quantization_config" not in config and config["model_type"] == "bert"
    assert model.config.quantization_config.plan
    with torch.no_grad():
        assert torch.equal(model(**batch(2, 8)).logits, logits)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: make_model("bert"), "BertForSequenceClassification has no packed layer"),
        (
            lambda: quantize_model(
                make_model("gpt2"), IPQConfig(block_size=4, n_centroids=16), progress=False
            ),
            "generates token by token",
        ),
        (
            lambda: quantize_model(
                make_vision_model("resnet"), FixedPointConfig(bits=4), progress=False
            ),
            "takes pixel_values, of a shape .*inputs=",
        ),
    ],
)
def test_what_cannot_be_exported_is_refused(tmp_path, make, words):
    need("onnx", "onnxscript")
    with pytest.raises(ValueError, match=words):
        export_onnx(make(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
