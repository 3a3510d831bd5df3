"""Saving and loading: bit-equal logits, the reported size, ties, and errors."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.decode_only import decode_only
from support.files import digest
from support.stored import STORED
from support.tiny import MAKERS, make_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from hf_quantnoise import (
    AutoQuantizedModel,
    AutoQuantizedModelForSequenceClassification,
    FixedPointConfig,
    IPQConfig,
    quantize_model,
    size_report,
)

AUTO = {
    "bert": AutoModelForSequenceClassification,
    "bert-mlm": AutoModelForMaskedLM,
    "roberta": AutoModelForSequenceClassification,
    "roberta-mlm": AutoModelForMaskedLM,
    "gpt2": AutoModelForCausalLM,
}
CONFIGS = {
    "ipq": STORED["ipq"],
    "ipq-mixed": IPQConfig(
        block_size={"ffn": 8, "embeddings": 8, "attention": 4}, n_centroids=16, codebook_bits=16
    ),
    "ipq-int8": STORED["8 bits"],
    "ipq-wide": IPQConfig(block_size=4, n_centroids=31, exclude_modules=r".*position.*|.*wpe"),
    "int4": FixedPointConfig(bits=4),
    "int1-channel": FixedPointConfig(bits=1, observer="channel"),
    "int8-histogram": FixedPointConfig(bits=8, observer="histogram"),
}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_codebooks", [1, 2])
def test_backward_without_step_keeps_8_bit_centroids(n_codebooks, dtype, input_ids, tmp_path):
    config = IPQConfig(block_size=4, n_centroids=16, codebook_bits=8, n_codebooks=n_codebooks)
    quantize_model(make_model("bert"), config, progress=False).save_pretrained(tmp_path / "a")
    load = AutoModelForSequenceClassification.from_pretrained
    model = decode_only(load(tmp_path / "a", dtype=dtype))
    model.save_pretrained(tmp_path / "b")
    expected = logits(model, input_ids)
    again = model(input_ids=input_ids).logits
    assert torch.equal(again, expected)
    again.sum().backward()
    assert model.get_input_embeddings().weight_codebook.grad.any()
    model.save_pretrained(tmp_path / "c")
    assert digest(tmp_path / "c") == digest(tmp_path / "b")


@pytest.mark.parametrize("name", MAKERS)
def test_reloaded_logits_are_bit_equal_and_files_identical(name, config, input_ids, tmp_path):
    model = quantize_model(make_model(name), config, progress=False)
    expected = logits(model, input_ids)
    model.save_pretrained(tmp_path / "a")
    for loader in (AUTO[name], AutoQuantizedModel):
        again, info = loader.from_pretrained(tmp_path / "a", output_loading_info=True)
        assert type(again) is type(model)
        assert torch.equal(logits(again, input_ids), expected)
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            assert not info[key]
    again.save_pretrained(tmp_path / "b")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    total, file = size_report(model).total, tmp_path / "a" / "model.safetensors"
    assert total.disk_bytes == pytest.approx(file.stat().st_size, rel=0.01)
    assert total.dense_bytes == 4 * make_model(name).num_parameters() > total.disk_bytes


def test_file_has_codes_and_no_derived_tensors(tmp_path):
    quantize_model(make_model("bert"), CONFIGS["ipq-mixed"], progress=False).save_pretrained(
        tmp_path
    )
    tensors = load_file(tmp_path / "model.safetensors")
    indices = tensors["bert.encoder.layer.0.intermediate.dense.weight_indices"]
    assert indices.dtype == torch.uint8
    assert indices.numel() == 64 * 32 // 8 * 4 // 8  # 16 centroids: half a byte per block
    codebook = tensors["bert.encoder.layer.0.intermediate.dense.weight_codebook"]
    assert (codebook.dtype, tuple(codebook.shape)) == (torch.float16, (16, 8))
    packed = [key for key in tensors if "weight_" in key and "pooler" not in key]
    assert all(key.endswith(("weight_indices", "weight_codebook")) for key in packed)
    assert not list(tmp_path.glob("*.bin")) and not list(tmp_path.glob("*.py"))


def test_base_model_loads_from_checkpoint_with_head(input_ids, tmp_path):
    model = quantize_model(make_model("bert"), CONFIGS["ipq"], progress=False)
    model.save_pretrained(tmp_path / "a")
    base = AutoModel.from_pretrained(tmp_path / "a")
    with torch.no_grad():
        expected = model.bert(input_ids=input_ids).last_hidden_state
        assert torch.equal(base(input_ids=input_ids).last_hidden_state, expected)
        base.save_pretrained(tmp_path / "b")
        again = AutoModel.from_pretrained(tmp_path / "b")
        assert torch.equal(again(input_ids=input_ids).last_hidden_state, expected)
    assert not any(key.startswith("bert.") for key in base.config.quantization_config.plan)


def test_new_lm_head_is_tied_to_packed_table(input_ids, tmp_path):
    quantize_model(make_model("bert"), CONFIGS["ipq"], progress=False).save_pretrained(
        tmp_path / "a"
    )
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "a")
    decoder = model.get_output_embeddings()
    assert decoder.weight_indices is model.get_input_embeddings().weight_indices
    expected = logits(model, input_ids)
    model.save_pretrained(tmp_path / "b")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "b")
    assert torch.equal(logits(again, input_ids), expected)


def test_dequantize_restores_class_and_keys(model, input_ids, tmp_path):
    plain_type, keys = type(model), list(model.state_dict())
    quantize_model(model, CONFIGS["ipq"], progress=False)
    expected = logits(model, input_ids)
    model.dequantize()
    assert type(model) is plain_type and list(model.state_dict()) == keys
    assert not hasattr(model.config, "quantization_config")
    torch.testing.assert_close(logits(model, input_ids), expected)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(again, input_ids), logits(model, input_ids))


# ---- errors --------------------------------------------------------------------------------------

RELOAD = """
import sys, torch, hf_quantnoise
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
with torch.no_grad():
    torch.save(model(input_ids=torch.load(sys.argv[2])).logits, sys.argv[3])
"""


def test_logits_are_bit_equal_in_another_process(input_ids, tmp_path):
    model = quantize_model(make_model("roberta"), CONFIGS["ipq"], progress=False)
    model.save_pretrained(tmp_path / "model")
    torch.save(input_ids, tmp_path / "ids")
    arguments = [str(tmp_path / name) for name in ("model", "ids", "logits")]
    torch_threads = torch.get_num_threads()
    script = f"import torch; torch.set_num_threads({torch_threads})\n{RELOAD}"
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "logits"), logits(model, input_ids))


@pytest.fixture
def saved(tmp_path):
    model = quantize_model(make_model("bert"), CONFIGS["ipq"], progress=False)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rewrite_config(folder, change):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    change(values["quantization_config"])
    path.write_text(json.dumps(values))


def test_missing_file_raises(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model.safetensors"):
        AutoQuantizedModel.from_pretrained(saved)


def test_truncated_file_raises(saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="truncated or corrupted"):
        AutoQuantizedModel.from_pretrained(saved)
    with pytest.raises(Exception, match=r"truncated|incomplete|invalid|deserializ"):
        AutoModelForSequenceClassification.from_pretrained(saved)


@pytest.mark.parametrize("tensor", ["weight_indices", "weight_codebook", "bias"])
def test_missing_tensor_raises(saved, tensor):
    path = saved / "model.safetensors"
    tensors = load_file(path)
    name = f"bert.encoder.layer.0.intermediate.dense.{tensor}"
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"lacks {name}"):
        AutoModelForSequenceClassification.from_pretrained(saved)


def test_plan_that_differs_from_file_raises(saved):
    def other_block_size(values):
        values["plan"]["bert.encoder.layer.0.intermediate.dense"]["block_size"] = 8

    rewrite_config(saved, other_block_size)
    with pytest.raises(ValueError, match=r"block_size=8.*has shape"):
        AutoModelForSequenceClassification.from_pretrained(saved)


def test_foreign_checkpoint_raises(saved, tmp_path):
    make_model("bert").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"not quantized.*AutoModel"):
        AutoQuantizedModel.from_pretrained(tmp_path / "dense")
    rewrite_config(saved, lambda values: values.update(quant_method="aqlm"))
    with pytest.raises(ValueError, match="quant_method='aqlm'"):
        AutoQuantizedModelForSequenceClassification.from_pretrained(saved)
    with pytest.raises(TypeError, match="from_pretrained"):
        AutoQuantizedModel()


# ---- errors that leave the model unchanged -------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (IPQConfig(block_size=5), ["block_size=5", "15 layers", "[32, 64]"]),
        (IPQConfig(stages=["fnn"]), ["'fnn'", "groups are"]),
        (IPQConfig(stages=["ffn", "conv"]), ["'conv'"]),
        (IPQConfig(target_modules=["nothing"]), ["target_modules='nothing'"]),
        (IPQConfig(n_centroids=60_000), ["centroids"]),
    ],
)
def test_impossible_config_changes_nothing(config, words, input_ids):
    model = make_model("bert")
    before = logits(model, input_ids)
    with pytest.raises(ValueError) as error:
        quantize_model(model, config)
    for word in words:
        assert word in str(error.value)
    assert torch.equal(logits(model, input_ids), before)
    assert not getattr(model, "is_quantized", False)


def test_quantizing_twice_raises():
    model = quantize_model(make_model("bert"), CONFIGS["ipq"], progress=False)
    with pytest.raises(ValueError, match=r"already quantized.*dequantize"):
        quantize_model(model, CONFIGS["ipq"])


def test_quantizing_plain_module_raises():
    with pytest.raises(TypeError, match=r"Linear.*PreTrainedModel"):
        quantize_model(torch.nn.Linear(8, 8), CONFIGS["ipq"])


def test_skipped_layers_are_in_config_and_report():
    model = quantize_model(make_model("bert"), IPQConfig(block_size=4, n_centroids=24))
    config = model.config.quantization_config
    assert "in no stage" in config.left_dense["classifier"]
    assert "bert.embeddings.token_type_embeddings" in config.left_dense
    assert "bert.embeddings.token_type_embeddings" in str(size_report(model))
    leftovers = set(config.plan) & set(config.left_dense)
    assert leftovers == {"bert.pooler.dense"}
    assert all(config.left_dense[name].endswith("stored as int8 channel") for name in leftovers)
