"""Folders of ONNX exports have the layout that transformers.js and optimum load."""

import json
import shutil

import pytest
import torch
from support.tiny import SIZES
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_quantnoise import FixedPointConfig, export_onnx, quantize_model
from hf_quantnoise.export.onnx_folder import onnx_path, save_companions
from hf_quantnoise.hub.processing import remember_processing

SMALL = {**SIZES, "num_hidden_layers": 1}


@pytest.fixture(autouse=True)
def _extra():
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason="needs the extra 'onnx'")


def packed(cls, config, processing, dtype=torch.float32):
    torch.manual_seed(0)
    model = cls(config).to(dtype).eval()
    model = quantize_model(model, FixedPointConfig(bits=8), progress=False)
    remember_processing(model, processing)
    return model


def tokenizer():
    words = WordLevel({"[UNK]": 0, "[PAD]": 1, "good": 2, "bad": 3}, unk_token="[UNK]")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), unk_token="[UNK]", pad_token="[PAD]"
    )


def names_of(folder):
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix() for path in paths}


def test_export_onnx_writes_the_folder_that_transformers_js_loads(tmp_path):
    import onnx

    config = BertConfig(**SMALL, id2label={0: "negative", 1: "positive"})
    model = packed(BertForSequenceClassification, config, tokenizer(), torch.bfloat16)
    result = export_onnx(model, tmp_path)
    assert result.file == tmp_path / "onnx" / "model.onnx"
    assert names_of(tmp_path) == {
        "config.json", "onnx/model.onnx", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["transformers.js_config"] == {"dtype": "fp32"}
    assert AutoConfig.from_pretrained(tmp_path).id2label == config.id2label
    assert AutoTokenizer.from_pretrained(tmp_path)("good")["input_ids"] == [2]
    # The newest that onnxruntime-web 1.18 reads.
    graph = onnx.load(str(result.file))
    assert graph.ir_version <= 10
    assert all(each.version <= 21 for each in graph.opset_import if not each.domain)
    # Its processor kernels have no bfloat16.
    types = {tensor.data_type for tensor in graph.graph.initializer}
    assert onnx.TensorProto.FLOAT in types and onnx.TensorProto.BFLOAT16 not in types


@pytest.mark.parametrize("name", ["image_processor", "feature_extractor"])
def test_part_of_a_processor_is_written_as_preprocessor_config(tmp_path, name):
    class Processor:
        def save_pretrained(self, folder):
            content = {name: {"size": 16}, "processor_class": "Any"}
            (tmp_path / folder / "processor_config.json").write_text(json.dumps(content))

    model = packed(BertForSequenceClassification, BertConfig(**SMALL), Processor())
    save_companions(model, str(tmp_path), "fp32", str(tmp_path))
    assert json.loads((tmp_path / "preprocessor_config.json").read_text()) == {"size": 16}


def test_image_processor_is_written(tmp_path):
    config = ViTConfig(**SMALL, image_size=32, patch_size=16)
    model = packed(
        ViTForImageClassification, config, ViTImageProcessor(size={"height": 32, "width": 32})
    )
    save_companions(model, str(tmp_path), "fp32", str(tmp_path))
    assert "preprocessor_config.json" in names_of(tmp_path)


def test_tokenizer_without_tokenizer_json_warns(tmp_path, caplog):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    model = packed(BertForSequenceClassification, BertConfig(**SMALL), None)
    save_companions(model, str(tmp_path), "fp32", str(tmp_path))
    assert "no tokenizer.json, which transformers.js reads" in caplog.text


def test_graphs_of_two_models_in_one_folder_are_refused(tmp_path):
    config = BertConfig(**SMALL)
    one = packed(BertForSequenceClassification, config, tokenizer())
    export_onnx(one, tmp_path)
    export_onnx(one, tmp_path, dtype="int8")
    other = packed(BertForSequenceClassification, BertConfig(**SMALL, num_labels=3), tokenizer())
    before = {name: (tmp_path / name).read_bytes() for name in names_of(tmp_path)}
    assert {"onnx/model.onnx", "onnx/model_int8.onnx"} < before.keys()
    with pytest.raises(ValueError, match=r"config\.json of another model.*choose another folder"):
        export_onnx(other, tmp_path, dtype="int8")
    assert before == {name: (tmp_path / name).read_bytes() for name in names_of(tmp_path)}


def clip():
    sizes = {k: v for k, v in SMALL.items() if k != "vocab_size"}
    text = {**sizes, "vocab_size": SIZES["vocab_size"]}
    return CLIPConfig(
        text_config=text, vision_config={**sizes, "image_size": 16, "patch_size": 8},
        projection_dim=16,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (BertForMaskedLM, lambda: BertConfig(**SMALL, architectures=["BertModel"])),
        (CLIPModel, clip),
    ],
)
def test_graphs_of_one_model_before_and_after_it_was_saved(cls, config, tmp_path):
    model = packed(cls, config(), tokenizer())
    onnx, saved = tmp_path / "onnx", tmp_path / "saved"

    def companions(model, dtype, name):
        part = tmp_path / name
        for folder in (part, onnx):
            (folder / "onnx").mkdir(parents=True, exist_ok=True)
        save_companions(model, str(part), dtype, str(onnx))
        (onnx / onnx_path(dtype)).touch()
        shutil.copy(part / "config.json", onnx)
        return json.loads((part / "config.json").read_text())

    before = companions(model, "fp32", "1")
    model.save_pretrained(saved)
    after = [
        companions(model, "int8", "2"),
        companions(cls.from_pretrained(saved), "fp32", "3"),
    ]
    for config in (before, *after):
        assert config.pop("transformers.js_config")
        assert "quantization_config" not in json.dumps(config)
        assert config["architectures"] == [cls.__name__]
    assert after == [before, before]
