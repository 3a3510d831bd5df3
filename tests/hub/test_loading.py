"""Loading with all options of transformers: heads, shards, dtypes, revisions, folders."""

import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.loaded import output, require_loaded
from support.memory import live_bytes
from support.stacked import inputs_of, make_stacked
from support.stored import PQ, STORED, tensors_of
from support.tiny import SIZES, make_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
)

import hf_quantnoise
from hf_quantnoise import AutoQuantizedModel, IPQConfig, quantize_model
from hf_quantnoise.hub.skeleton import SHAPES_ARE_CHECKED

# Messages of the package, and of transformers' own loader.
NOT_CACHED = "no repository of this name with these files in the cache|in the cached files"


def _bert(cls):
    torch.manual_seed(0)
    return cls(BertConfig(**SIZES)).eval()


HEADS = {
    "CausalLM": ("gpt2", lambda: make_stacked("gpt2", 2)),
    "ImageClassification": ("vit", lambda: make_stacked("vit", 2)),
    "MaskedLM": ("distilbert", lambda: make_stacked("distilbert", 2)),
    "QuestionAnswering": ("bert", lambda: _bert(BertForQuestionAnswering)),
    "Seq2SeqLM": ("bart", lambda: make_stacked("bart", 2)),
    "SequenceClassification": ("deberta", lambda: make_stacked("deberta", 2)),
    "TokenClassification": ("bert", lambda: _bert(BertForTokenClassification)),
}


@pytest.mark.parametrize("head", HEADS)
def test_every_head_loads_with_every_loader(head, tmp_path):
    name, make = HEADS[head]
    config = IPQConfig(**PQ, stages=["ffn", "attention"]) if name == "vit" else STORED["ipq"]
    model = quantize_model(make(), config, progress=False)
    model.save_pretrained(tmp_path)
    loaders = (
        getattr(transformers, f"AutoModelFor{head}"),
        getattr(hf_quantnoise, f"AutoQuantizedModelFor{head}"),
        AutoQuantizedModel,
        type(model),
    )
    for loader in loaders:
        again = require_loaded(loader.from_pretrained(tmp_path, output_loading_info=True))
        assert type(again) is type(model) and again.is_quantized and not again.training
        assert torch.equal(output(again, inputs_of(name)), output(model, inputs_of(name)))


def test_shards_reload_and_save_identically(tmp_path, saved):
    folder, expected, inputs = saved(name="gpt2")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(
        tmp_path / "a", max_shard_size="2KB"
    )
    again = require_loaded(
        AutoQuantizedModel.from_pretrained(tmp_path / "a", output_loading_info=True)
    )
    assert torch.equal(output(again, inputs), expected)
    again.save_pretrained(tmp_path / "b", max_shard_size="2KB")
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len([name for name in files if name.startswith("model-")]) > 2
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, "float16"])
def test_dtype_casts_floats_and_keeps_codes(kind, dtype, saved):
    folder, expected, inputs = saved(STORED[kind])
    model = require_loaded(
        AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=dtype, output_loading_info=True
        )
    )
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    stored = load_file(folder / "model.safetensors")
    for name, tensor in tensors_of(model).items():
        if name.endswith("weight_indices"):
            assert tensor.dtype == torch.uint8 and torch.equal(tensor, stored[name])
        else:
            assert tensor.dtype == wanted, name
    logits = output(model, inputs)
    assert logits.dtype == wanted
    torch.testing.assert_close(logits.float(), expected, rtol=0.05, atol=0.02)


def test_dtype_auto_uses_checkpoint_dtype(saved, tmp_path):
    folder, expected, inputs = saved()
    auto = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto")
    assert auto.dtype == torch.float32 and torch.equal(output(auto, inputs), expected)
    half = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "half", dtype="auto")
    assert again.dtype == torch.bfloat16
    assert torch.equal(output(again, inputs), output(half, inputs))


def test_modules_kept_in_float32_stay_float32(tmp_path):
    """T5 keeps its wo layers in float32 when it is loaded in float16."""
    dense = make_stacked("t5", 2)
    dense.save_pretrained(tmp_path / "dense")
    half = {"dtype": torch.float16}
    kept = type(dense).from_pretrained(tmp_path / "dense", **half).state_dict()
    kept = {name: tensor.dtype for name, tensor in kept.items()}
    model = quantize_model(dense, STORED["ipq"], progress=False)
    model.save_pretrained(tmp_path / "packed")
    expected = output(model, inputs_of("t5"))
    loaded = require_loaded(
        AutoQuantizedModel.from_pretrained(tmp_path / "packed", **half, output_loading_info=True)
    )
    for name, tensor in tensors_of(loaded).items():
        if tensor.is_floating_point():
            assert tensor.dtype == (torch.float32 if ".wo." in name else torch.float16), name
    torch.testing.assert_close(
        output(loaded, inputs_of("t5")).float(), expected, rtol=0.05, atol=0.02
    )
    loaded.dequantize()
    assert {name: tensor.dtype for name, tensor in loaded.state_dict().items()} == kept


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attn_implementation(attention, saved):
    folder, expected, inputs = saved()
    model = AutoQuantizedModel.from_pretrained(folder, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    torch.testing.assert_close(output(model, inputs), expected)


# ---- another config ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ipq", "int8"])  # with a dense head, and with a packed one
def test_head_of_another_shape_raises(kind, saved):
    folder, _, _ = saved(STORED[kind])
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=5)


@pytest.mark.skipif(not SHAPES_ARE_CHECKED, reason="initialised by transformers 5.23 and newer")
def test_mismatched_packed_head_is_initialised_dense(saved, tmp_path):
    folder, _, inputs = saved(STORED["int8"])
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=5, ignore_mismatched_sizes=True
    )
    config = model.config.quantization_config
    assert "classifier" not in config.plan
    assert "5 x 32 in this model and 2 x 32" in config.left_dense["classifier"]
    model.save_pretrained(tmp_path / "five")
    again = AutoQuantizedModel.from_pretrained(tmp_path / "five")
    assert again.config.quantization_config.left_dense == config.left_dense
    assert torch.equal(output(again, inputs), output(model, inputs))


def test_config_from_another_folder(saved, tmp_path):
    folder, expected, inputs = saved()
    shutil.copytree(folder, tmp_path / "other")
    for file in (tmp_path / "other").glob("*.safetensors"):
        file.unlink()
    model = AutoQuantizedModel.from_pretrained(folder, config=str(tmp_path / "other"))
    assert torch.equal(output(model, inputs), expected)
    with pytest.raises(ValueError, match="dense' is not quantized"):
        make_model("bert").config.save_pretrained(tmp_path / "dense")
        AutoQuantizedModel.from_pretrained(folder, config=tmp_path / "dense")


# ---- where files are -----------------------------------------------------------------------------


def test_subfolder(saved, tmp_path):
    folder, expected, inputs = saved()
    shutil.move(folder, tmp_path / "repository" / "small")
    for loader in (AutoQuantizedModel, AutoModelForSequenceClassification):
        model = loader.from_pretrained(tmp_path / "repository", subfolder="small")
        assert torch.equal(output(model, inputs), expected)
    with pytest.raises((OSError, ValueError), match=r"config.json"):
        AutoQuantizedModel.from_pretrained(tmp_path / "repository")


def test_cached_revision(saved, tmp_path):
    """In a cache of huggingface_hub whose newest revision has other weights."""
    folder, expected, inputs = saved()
    repository = tmp_path / "cache" / "models--me--small"
    for branch, commit in (("main", "a" * 40), ("v1", "b" * 40)):
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
    newest = repository / "snapshots" / ("a" * 40)
    quantize_model(make_model("bert", seed=1), STORED["ipq"], progress=False).save_pretrained(
        newest
    )
    where = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    for loader in (AutoQuantizedModel, AutoModelForSequenceClassification):
        old = loader.from_pretrained("me/small", revision="v1", **where)
        assert torch.equal(output(old, inputs), expected)
        assert not torch.equal(
            output(loader.from_pretrained("me/small", **where), inputs), expected
        )
    with pytest.raises(OSError, match=NOT_CACHED):
        AutoQuantizedModel.from_pretrained("me/other", **where)


def test_cached_revision_with_subfolder(saved, tmp_path):
    folder, expected, inputs = saved()
    repository = tmp_path / "cache" / "models--me--models"
    for branch, commit, where in (("main", "a" * 40, "other"), ("v1", "b" * 40, "in/small")):
        shutil.copytree(folder, repository / "snapshots" / commit / where)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
    place = {"subfolder": "in/small", "cache_dir": tmp_path / "cache", "local_files_only": True}
    for loader in (AutoQuantizedModel, AutoModelForSequenceClassification):
        model = loader.from_pretrained("me/models", revision="v1", **place)
        assert torch.equal(output(model, inputs), expected)
        with pytest.raises(OSError, match=NOT_CACHED):
            loader.from_pretrained("me/models", **place)


# ---- cost ----------------------------------------------------------------------------------------


def test_loading_peak_memory(saved, monkeypatch):
    """The peak is the file, mapped by transformers and by the package, and the model, but never a
    dense weight. Loading uses one thread, as others are not measured."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    folder, _, _ = saved()
    make_model("bert").save_pretrained(folder.parent / "dense")
    load = AutoModelForSequenceClassification.from_pretrained
    load(folder)  # caches of the process
    dense = live_bytes(lambda: load(folder.parent / "dense"))
    packed = live_bytes(lambda: load(folder))
    dense_layers = (packed.result.bert.pooler.dense, packed.result.classifier)
    own = sum(layer.weight.nbytes for layer in dense_layers)  # copied for alignment
    buffers = sum(tensor.nbytes for tensor in packed.result.buffers())
    file = (folder / "model.safetensors").stat().st_size
    assert packed.left <= packed.peak <= 2 * file + own + buffers + 1024
    assert packed.peak < dense.peak
