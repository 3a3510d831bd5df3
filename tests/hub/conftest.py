"""A local Hub, and a saved model."""

import pytest
from support.hub_server import HubServer
from support.loaded import output
from support.stacked import inputs_of
from support.stored import STORED
from support.tiny import make_model

from hf_quantnoise import quantize_model


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def saved(tmp_path):
    """Save a tiny BERT (or another model); return its folder, its logits and their inputs."""

    def save(config=STORED["ipq"], name="bert"):
        model = quantize_model(make_model(name), config, progress=False)
        model.save_pretrained(tmp_path / "model")
        inputs = {"input_ids": inputs_of("bert")["input_ids"]}
        return tmp_path / "model", output(model, inputs), inputs

    return save
