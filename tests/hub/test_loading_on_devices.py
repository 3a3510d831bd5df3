"""Loading onto devices: ``device_map``, offloading to the disk and to the CPU."""

import re

import accelerate
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.loaded import output, require_loaded
from support.stacked import make_stacked
from support.stored import PQ, STORED, tensors_of

from hf_quantnoise import AutoQuantizedModel, IPQConfig, quantize_model

PARTS = ("bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1", "bert.pooler",
         "classifier")  # fmt: skip


def parts_on(**places):
    return {name: places.get(name.rpartition(".")[2], "cpu") for name in PARTS}


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map_on_one_device(device_map, saved):
    folder, expected, inputs = saved()
    model = require_loaded(
        AutoQuantizedModel.from_pretrained(folder, device_map=device_map, output_loading_info=True)
    )
    assert torch.equal(output(model, inputs), expected)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_device_map_auto_offloads_to_disk(name, saved, tmp_path):
    """The sizes of packed layers count, and blocks stay on one device."""
    folder, expected, inputs = saved(name=name)
    tensors = tensors_of(AutoQuantizedModel.from_pretrained(folder)).values()
    size = sum({id(tensor): tensor.nbytes for tensor in tensors}.values())
    room = size * 4 // 5
    model = require_loaded(
        AutoQuantizedModel.from_pretrained(
            folder, device_map="auto", max_memory={"cpu": room},
            offload_folder=tmp_path / "offload", output_loading_info=True,
        )
    )  # fmt: skip
    places = model.hf_device_map
    assert set(places.values()) == {"cpu", "disk"}
    whole_blocks = {"bert": r"layer\.\d+\.", "gpt2": r"h\.\d+\."}[name]
    assert not any(re.search(whole_blocks, place) for place in places)
    in_memory = {id(t): t.nbytes for t in tensors_of(model).values() if not t.is_meta}
    assert 0 < sum(in_memory.values()) <= room
    torch.testing.assert_close(output(model, inputs), expected)
    model.save_pretrained(tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        assert (folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


@pytest.mark.parametrize("kind", ["ipq", "16 bits", "rows", "int8"])
def test_layers_offloaded_to_disk_run_and_save_identically(kind, saved, tmp_path):
    folder, expected, inputs = saved(STORED[kind])
    model = require_loaded(
        AutoQuantizedModel.from_pretrained(
            folder, device_map=parts_on(**{"1": "disk", "embeddings": "disk"}),
            offload_folder=tmp_path / "offload", output_loading_info=True,
        )
    )  # fmt: skip
    assert model.bert.encoder.layer[1].output.dense.weight_indices.is_meta
    assert not model.bert.encoder.layer[0].output.dense.weight_indices.is_meta
    torch.testing.assert_close(output(model, inputs), expected)
    model.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_layers_offloaded_to_cpu_run(saved, monkeypatch):
    """As on an accelerator that is too small for the model."""

    def dispatch(model, *_):
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))

    monkeypatch.setattr(transformers.modeling_utils, "accelerate_dispatch", dispatch)
    two_places = {**parts_on(), "classifier": torch.device("cpu")}  # with one nothing is dispatched
    folder, expected, inputs = saved(STORED["16 bits"])
    model = AutoQuantizedModel.from_pretrained(folder, device_map=two_places)
    assert model.bert.encoder.layer[1].output.dense.weight_indices.is_meta
    torch.testing.assert_close(output(model, inputs), expected)
    folder, _, _ = saved(STORED["8 bits"])
    with pytest.raises(ValueError, match=r"in 8 bits.*'cpu'"):
        AutoQuantizedModel.from_pretrained(folder, device_map=two_places)


def test_offloading_8_bit_centroids_raises(saved, tmp_path):
    folder, _, _ = saved(STORED["8 bits"])
    with pytest.raises(ValueError, match=r"device_map: bert.encoder.layer.1.* 8 bits.*'disk'"):
        AutoQuantizedModel.from_pretrained(folder, device_map=parts_on(**{"1": "disk"}))
    # Layers with 8-bit centroids that stay in memory do not matter.
    config = IPQConfig(**PQ, codebook_bits=8, exclude_modules=r".*layer\.1\..*")
    folder, expected, inputs = saved(config)
    model = AutoQuantizedModel.from_pretrained(folder, device_map=parts_on(**{"1": "disk"}))
    torch.testing.assert_close(output(model, inputs), expected)


def test_offloading_shared_dense_conv1d_raises(tmp_path):
    config = IPQConfig(**PQ, share_layers=2, stages=["ffn"], leftover_bits=16)
    quantize_model(make_stacked("gpt2", 2), config, progress=False).save_pretrained(tmp_path)
    places = {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.h": "disk",
              "transformer.ln_f": "cpu", "lm_head": "cpu"}  # fmt: skip
    with pytest.raises(ValueError, match=r"device_map: .*shared by layers.*'disk'"):
        AutoQuantizedModel.from_pretrained(tmp_path, device_map=places)


def test_missing_offloaded_tensor_is_named(saved):
    folder, _, _ = saved()
    tensors = load_file(folder / "model.safetensors")
    del tensors["bert.encoder.layer.1.output.dense.weight_indices"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises((KeyError, ValueError), match=r"layer.1.output.dense.weight_indices"):
        AutoQuantizedModel.from_pretrained(folder, device_map=parts_on(**{"1": "disk"}))
