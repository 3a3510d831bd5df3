"""Models of the user's code: in files next to the model, or registered with the auto classes."""

import shutil
import sys

import pytest
import torch
from support.own_code import CODE_FILES, write_own_model
from support.tiny import SIZES
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    dynamic_module_utils,
)

from hf_quantnoise import (
    AutoQuantizedModel,
    AutoQuantizedModelForMaskedLM,
    AutoQuantizedModelForSequenceClassification,
    IPQConfig,
    QuantNoiseCard,
    quantize_model,
)
from hf_quantnoise.cli import main
from hf_quantnoise.modeling import packed_layers
from hf_quantnoise.publishing.snippets import usage_snippet

IDS = torch.arange(12).view(2, 6)
PQ = IPQConfig(block_size=4, n_centroids=8, stages=["head", "embeddings"])


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Folders ``dense`` and ``packed`` of a model with its code, which has not run since."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)  # of another test's folder
    mark = tmp_path / "mark"
    model = write_own_model(tmp_path / "dense", mark)
    quantize_model(model, PQ, progress=False)
    model.save_pretrained(tmp_path / "packed")
    assert mark.exists()
    mark.unlink()
    shutil.rmtree(tmp_path / "modules")
    return tmp_path, mark, model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_code_on_the_card_loads_the_model(own):
    folder, _, model = own
    card = QuantNoiseCard(repo_id=str(folder / "packed"))
    for packed in (True, False):
        names = {}
        exec(usage_snippet(model, str(folder / "packed"), None, packed), names)
        assert torch.equal(logits(names["model"]), logits(model))
    assert card.render(model).data.pipeline_tag == "text-classification"


LOADERS = [AutoQuantizedModel, AutoQuantizedModelForSequenceClassification]


@pytest.mark.parametrize("loader", LOADERS)
def test_trusted_code_is_run_and_saved_again(own, loader):
    folder, mark, model = own
    again = loader.from_pretrained(folder / "packed", trust_remote_code=True)
    assert mark.exists() and type(again).__name__ == "OwnForSequenceClassification"
    assert any(packed_layers(again)) and torch.equal(logits(again), logits(model))
    again.save_pretrained(folder / "saved")
    for name in (*CODE_FILES, "config.json", "model.safetensors"):
        assert (folder / "saved" / name).exists(), name
    third = loader.from_pretrained(folder / "saved", trust_remote_code=True)
    assert torch.equal(logits(third), logits(model))


@pytest.mark.parametrize("kwargs", [{}, {"trust_remote_code": False}], ids=str)
@pytest.mark.parametrize("loader", LOADERS)
def test_code_is_not_run_without_trust(own, loader, kwargs, monkeypatch):
    folder, mark, _ = own
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks on the terminal"))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        loader.from_pretrained(folder / "packed", **kwargs)
    assert not mark.exists()


def test_commands_run_code_only_if_trusted(own, monkeypatch, capsys):
    folder, mark, model = own
    monkeypatch.chdir(folder)
    sizes = "--block_size 4 --n_centroids 8 --stages head embeddings"
    lines = {
        "report": "report packed",
        "plan": f"plan dense {sizes}",
        "compress": f"compress dense again {sizes}",
        "convert": "convert packed plain --to dense",
    }
    for name, line in lines.items():
        assert main(line.split()) == (name != "report")  # it lists the files' tensors, with a note
        assert "--trust_remote_code" in capsys.readouterr().err
    assert not mark.exists()
    for line in lines.values():
        assert main([*line.split(), "--trust_remote_code"]) == 0, capsys.readouterr().err
    assert mark.exists()
    again = AutoQuantizedModel.from_pretrained("again", trust_remote_code=True)
    assert torch.equal(logits(again), logits(model))
    for made in ("again", "plain"):
        assert all((folder / made / name).exists() for name in CODE_FILES), made


class RegisteredConfig(BertConfig):
    model_type = "registered"


class RegisteredForMaskedLM(BertForMaskedLM):
    config_class = RegisteredConfig

    def __init__(self, config):
        super().__init__(config)
        self.extra = nn.Linear(config.hidden_size, 64)


@pytest.fixture
def registered():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    AutoConfig.register("registered", RegisteredConfig)
    AutoModelForMaskedLM.register(RegisteredConfig, RegisteredForMaskedLM)
    yield
    del CONFIG_MAPPING._extra_content["registered"]
    del AutoModelForMaskedLM._model_mapping._extra_content[RegisteredConfig]


@pytest.mark.parametrize("loader", [AutoQuantizedModel, AutoQuantizedModelForMaskedLM])
def test_registered_class_loads(registered, tmp_path, loader, monkeypatch):
    torch.manual_seed(0)
    model = RegisteredForMaskedLM(RegisteredConfig(**SIZES)).eval()
    model.save_pretrained(tmp_path / "dense")
    quantize_model(model, IPQConfig(n_centroids=16), progress=False)
    model.save_pretrained(tmp_path / "packed")
    again = loader.from_pretrained(tmp_path / "packed")
    assert type(again) is RegisteredForMaskedLM and torch.equal(logits(again), logits(model))
    monkeypatch.chdir(tmp_path)
    assert main(["report", "packed"]) == 0
    assert main(["compress", "dense", "again", "--n_centroids", "16"]) == 0
    assert torch.equal(logits(loader.from_pretrained("again")), logits(model))


def test_unknown_class_names_the_ways_out(registered, tmp_path):
    model = RegisteredForMaskedLM(RegisteredConfig(**SIZES))
    quantize_model(model, IPQConfig(n_centroids=16), progress=False)
    model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("RegisteredForMaskedLM", "NoSuchModel"))
    with pytest.raises(ValueError, match=r"architectures.*register it.*trust_remote_code"):
        AutoQuantizedModel.from_pretrained(tmp_path)
