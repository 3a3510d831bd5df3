"""Packed layers read straight from the file are what transformers would have read."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.files import digest
from support.stacked import inputs_of, make_stacked
from support.stored import PQ, STORED, tensors_of
from support.tiny import make_model
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    conversion_mapping,
    core_model_loading,
)

from hf_quantnoise import IPQConfig, quantize_model
from hf_quantnoise.hub import reading
from hf_quantnoise.modeling import packed_layers
from hf_quantnoise.modeling.convert import is_packed

LOADERS = {
    "bert": AutoModelForSequenceClassification,
    "roberta-mlm": AutoModelForMaskedLM,
    "bert without its head": AutoModel,
}


@pytest.fixture
def handled(monkeypatch):
    """Record the names of the tensors that transformers itself puts into a model."""
    names = []
    original = core_model_loading.set_param_for_module

    def seen(model, name, *rest):
        names.append(name)
        return original(model, name, *rest)

    monkeypatch.setattr(core_model_loading, "set_param_for_module", seen)
    return names


@torch.no_grad()
def output(model):
    return model(input_ids=inputs_of("bert")["input_ids"])[0]


def save(folder, config=STORED["ipq"], name="bert"):
    model = quantize_model(make_model(name), config, progress=False)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("kind", STORED)
def test_direct_read_matches_transformers(kind, name, dtype, tmp_path, monkeypatch, handled):
    save(tmp_path, STORED[kind], name.partition(" ")[0])
    load = LOADERS[name].from_pretrained
    here, faults = load(tmp_path, dtype=dtype, output_loading_info=True)
    packed = [f"{layer}." for layer, _ in packed_layers(here)]
    assert packed and handled
    assert not [own for own in handled if own.startswith(tuple(packed))]
    assert not faults["missing_keys"] and not faults["mismatched_keys"]
    head = {own for own in faults["unexpected_keys"] if own.startswith("classifier.")}
    assert faults["unexpected_keys"] == head and bool(head) == ("without" in name)
    monkeypatch.setattr(reading, "_can_read", lambda *_: False)
    there = load(tmp_path, dtype=dtype)
    assert [own for own in handled if own.startswith(tuple(packed))]
    assert type(here) is type(there)
    assert list(here.state_dict()) == list(there.state_dict())
    for (own, parameter), (_, other) in zip(
        tensors_of(here).items(), tensors_of(there).items(), strict=True
    ):
        assert torch.equal(parameter, other), own
        assert parameter.dtype == other.dtype and type(parameter) is type(other), own
        assert parameter.requires_grad == other.requires_grad, own
    assert torch.equal(output(here), output(there))
    assert here.all_tied_weights_keys == there.all_tied_weights_keys
    assert here.hf_quantizer.quantization_config == there.hf_quantizer.quantization_config


def test_direct_read_of_shards(tmp_path, handled):
    model = save(tmp_path)
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "shards")
    assert not [name for name in handled if name.endswith("weight_indices")]
    assert torch.equal(output(again), output(model))


@torch.no_grad()
def test_logits_do_not_depend_on_file_alignment(tmp_path):
    """With one token: the last bits of matrix-vector products depend on the alignment."""
    config = IPQConfig(**PQ, exclude_modules=r".*layer\.1\..*|.*position.*")
    model = quantize_model(make_model("bert"), config, progress=False)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    token = torch.tensor([[5]])
    for shift in range(0, 64, 8):
        save_file(tensors, file, {"format": "pt", "shift": " " * shift})
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        assert torch.equal(again(token).logits, model(token).logits), shift


def test_model_can_overwrite_its_own_files(tmp_path):
    save(tmp_path)
    before = digest(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    logits = output(model)
    model.save_pretrained(tmp_path)
    assert digest(tmp_path) == before
    assert torch.equal(output(model), logits)
    model.bert.encoder.layer[0].output.dense.weight_codebook.data.zero_()
    assert digest(tmp_path) == before  # training does not write to the file
    (tmp_path / "model.safetensors").unlink()
    assert not torch.equal(output(model), logits)


def _numbered_one_higher(folder):
    """Rename layer n of a saved BERT to n + 1 in its file, and return the mapping back."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if ".layer." in name]:
        head, _, rest = name.partition(".layer.")
        number, _, rest = rest.partition(".")
        tensors[f"{head}.layer.{int(number) + 1}-.{rest}"] = tensors.pop(name)
    tensors = {name.replace("-.", "."): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return {rf"layer\.{number + 1}\.": f"layer.{number}." for number in range(2)}


def test_renamed_tensors_are_left_to_transformers(tmp_path, monkeypatch):
    model = save(tmp_path)
    mapping = _numbered_one_higher(tmp_path)
    load = AutoModelForSequenceClassification.from_pretrained
    with pytest.raises(ValueError, match=r"bert\.encoder\.layer\.2.*key_mapping"):
        load(tmp_path, key_mapping=mapping)
    conversion_mapping.get_checkpoint_conversion_mapping("bert")  # makes the cache
    known = conversion_mapping._checkpoint_conversion_mapping_cache
    renamings = [core_model_loading.WeightRenaming(old, new) for old, new in mapping.items()]
    monkeypatch.setitem(known, "bert", renamings)
    again, faults = load(tmp_path, output_loading_info=True)
    assert not any(faults.values())
    assert torch.equal(output(again), output(model))


def test_direct_read_of_shared_layers(tmp_path):
    config = IPQConfig(**PQ, share_layers=2)
    model = quantize_model(make_stacked("bert", 4), config, progress=False)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(output(again), output(model.eval()))
    layers = again.base_model.encoder.layer
    assert is_packed(layers[0].output.dense)
    indices = [layer.output.dense.weight_indices for layer in layers]
    assert indices[0] is indices[1] and indices[1] is not indices[2]


name = st.lists(st.sampled_from(["layer", "a.b", "0", "12", "bias", "w+"]), min_size=1).map(
    ".".join
)


@given(st.sets(name, min_size=1), st.sets(name))
def test_pattern_of_matches_exactly_its_names(names, others):
    pattern = re.compile(reading.pattern_of(names))
    for own in names | others:
        assert (pattern.search(own) is not None) == (own in names)
