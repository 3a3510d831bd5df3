"""Files of different saves are not loaded together."""

import json
import shutil

import pytest
import torch
from support.files import digest
from support.stacked import make_stacked
from support.stored import STORED
from support.tiny import make_model
from support.trainers import ONE_STAGE, make_trainer
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from hf_quantnoise import AutoQuantizedModel, CompressionArguments, IPQConfig, quantize_model

SHARDED = {"max_shard_size": "8KB"}
SHAPES = {"single file": {}, "shards": SHARDED}


@pytest.fixture(scope="module")
def saves(tmp_path_factory):
    """Two models of the same shape, each in shards and in one file: number, shape -> folder."""
    folder, found = tmp_path_factory.mktemp("saves"), {}
    for number in (0, 1):
        model = quantize_model(make_model("bert", number), STORED["ipq"], progress=False)
        for shape, arguments in SHAPES.items():
            found[number, shape] = folder / f"{shape}-{number}"
            model.save_pretrained(found[number, shape], **arguments)
    return found


def weights(folder):
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize("loader", [AutoQuantizedModel, AutoModelForSequenceClassification])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_file_of_another_save_is_found(saves, shape, loader, tmp_path):
    """Also files without an id, and a config without one."""
    folder = tmp_path / "mixed"
    for file in [*weights(saves[0, shape]), saves[0, shape] / "config.json"]:
        shutil.copytree(saves[0, shape], folder, dirs_exist_ok=True)
        loader.from_pretrained(folder)
        shutil.copyfile(saves[1, shape] / file.name, folder / file.name)
        with pytest.raises(ValueError, match=r"invalid weights_id.*of different saves") as error:
            loader.from_pretrained(folder)
        assert file.name in str(error.value)
    values = json.loads((folder / "config.json").read_text())
    del values["quantization_config"]["weights_id"]
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"expected None as in config.json"):
        loader.from_pretrained(folder)


@pytest.mark.parametrize("shape", SHAPES)
def test_saving_a_loaded_model_keeps_the_id(saves, shape, tmp_path):
    model = AutoQuantizedModel.from_pretrained(saves[0, shape])
    model.save_pretrained(tmp_path, **SHAPES[shape])
    assert digest(tmp_path) == digest(saves[0, shape])
    ids = [
        json.loads((folder / "config.json").read_text())["quantization_config"]["weights_id"]
        for folder in saves.values()
    ]
    assert len(set(ids)) == 2


@pytest.mark.parametrize("new", SHAPES)
@pytest.mark.parametrize("old", SHAPES)
def test_save_over_another_shape_leaves_only_the_new_model(saves, old, new, tmp_path):
    shutil.copytree(saves[0, old], tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.other.safetensors").write_bytes(b"of another variant")
    (tmp_path / "notes.txt").write_text("mine")
    model = AutoQuantizedModel.from_pretrained(saves[1, new])
    model.save_pretrained(tmp_path, **SHAPES[new])
    assert digest(tmp_path) == {
        **digest(saves[1, new]),
        "model.other.safetensors": digest(tmp_path)["model.other.safetensors"],
    }
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_stale_file_that_transformers_would_load_is_found(saves, tmp_path):
    """transformers' own method leaves model.safetensors next to new shards, and loads it."""
    shutil.copytree(saves[0, "single file"], tmp_path, dirs_exist_ok=True)
    model = AutoQuantizedModel.from_pretrained(saves[1, "shards"])
    PreTrainedModel.save_pretrained(model, tmp_path, **SHARDED)
    with pytest.raises(ValueError, match=r"in model.safetensors, expected"):
        AutoQuantizedModel.from_pretrained(tmp_path)


def test_compressed_model_has_no_id_of_its_last_checkpoint(parity_data, tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    trainer = make_trainer(tmp_path, make_model("bert"), parity_data, **arguments)
    trainer.compress(ONE_STAGE, CompressionArguments(stage_steps=3, plots=False))
    assert trainer.model.config.quantization_config.weights_id is None
    stage = json.loads((tmp_path / "compression" / "stage-1" / "stage.json").read_text())
    assert stage["config"]["weights_id"] is None


def test_reused_config_has_no_records_of_the_other_model(tmp_path):
    shared = IPQConfig(n_centroids=4, share_layers=2, prune_layers=["3"])
    model = quantize_model(make_stacked("bert", 4), shared, progress=False)
    model.save_pretrained(tmp_path)
    config = model.config.quantization_config
    assert config.shared_layers and config.pruned_layers and config.weights_id
    config.share_layers = config.prune_layers = None
    reused = quantize_model(make_model("bert", 1), config, progress=False)
    fresh = quantize_model(make_model("bert", 1), IPQConfig(n_centroids=4), progress=False)
    written, expected = (each.config.quantization_config.to_dict() for each in (reused, fresh))
    assert written | {"stages": None} == expected | {"stages": None}


@pytest.mark.parametrize("shape", SHAPES)
def test_variants_of_a_model_load_from_one_folder(saves, shape, tmp_path):
    """In any order of saving; shards of a variant must be of one save."""
    model = AutoQuantizedModel.from_pretrained(saves[0, shape])
    half = AutoQuantizedModel.from_pretrained(saves[0, shape], dtype=torch.float16)
    model.save_pretrained(tmp_path, **SHAPES[shape])
    half.save_pretrained(tmp_path, variant="fp16", **SHAPES[shape])
    for _ in range(2):
        for variant, dtype in ((None, torch.float32), ("fp16", torch.float16)):
            again = AutoQuantizedModel.from_pretrained(tmp_path, variant=variant, dtype=dtype)
            expected = half if variant else model
            for name, tensor in again.state_dict().items():
                assert torch.equal(tensor, expected.state_dict()[name])
        model.save_pretrained(tmp_path, **SHAPES[shape])
    other = AutoQuantizedModel.from_pretrained(saves[1, shape], dtype=torch.float16)
    other.save_pretrained(tmp_path / "other", variant="fp16", **SHAPES[shape])
    files = sorted(tmp_path.glob("*fp16*.safetensors"))
    if len(files) > 1:
        shutil.copyfile(tmp_path / "other" / files[0].name, files[0])
        with pytest.raises(ValueError, match=r"invalid weights_id.*of different saves"):
            AutoQuantizedModel.from_pretrained(tmp_path, variant="fp16")
