"""Publishing to, and loading back from, a local server that speaks the Hub's endpoints.

The pushes run in processes of their own: huggingface_hub reads HF_ENDPOINT once, at import.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from tiny import make_model

from hf_quantnoise import AutoQuantizedModel, IPQConfig, quantize_model

HEADER = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parents[1])]!r}
import torch
torch.set_num_threads({torch.get_num_threads()})
from tiny import make_model
from hf_quantnoise import *
from transformers import AutoModelForSequenceClassification, TrainingArguments, pipeline
folder = sys.argv[1]
"""

PUSH = """
model = AutoQuantizedModel.from_pretrained(folder)
model.push_to_hub("me/small")
"""

TRAINER_PUSH = """
trainer = QuantNoiseTrainer(
    make_model("bert"),
    TrainingArguments(folder + "/run", hub_model_id="me/trained", use_cpu=True, report_to="none"),
    QuantNoiseConfig(p=0.1),
)
trainer.compress(IPQConfig(n_centroids=16), CompressionArguments(stage_epochs=0))
trainer.push_to_hub()
"""

LOAD = """
ids = torch.load(folder + "/ids")
for loader in (AutoQuantizedModel, AutoModelForSequenceClassification):
    model = loader.from_pretrained("me/small")
    with torch.no_grad():
        torch.save(model(ids).logits, folder + "/" + loader.__name__)
"""


@pytest.fixture
def run(tmp_path):
    with HubServer() as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "cache"),
            "HF_TOKEN": "hf_local",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

        def run(script):
            result = subprocess.run(
                [sys.executable, "-c", HEADER + script, str(tmp_path)],
                env=environment,
                capture_output=True,
                text=True,
            )
            assert result.returncode == 0, result.stderr[-3000:]

        run.hub = hub
        yield run


def test_push_and_load_back(run, tmp_path, input_ids):
    model = quantize_model(make_model("bert"), IPQConfig(n_centroids=16), progress=False)
    model.save_pretrained(tmp_path)
    torch.save(input_ids, tmp_path / "ids")
    run(PUSH)
    files = run.hub.repos["me/small"]
    assert files["model.safetensors"] == (tmp_path / "model.safetensors").read_bytes()
    # transformers writes this card: its tags are all that a model can put at its top.
    head = files["README.md"].decode().split("---")[1]
    assert "- quant-noise" in head and "- import-hf_quantnoise" in head
    run(LOAD)
    with torch.no_grad():
        expected = model(input_ids).logits
    for loader in ("AutoQuantizedModel", "AutoModelForSequenceClassification"):
        assert torch.equal(torch.load(tmp_path / loader), expected)


def test_the_trainer_pushes_model_and_card(run, tmp_path):
    run(TRAINER_PUSH)
    files = run.hub.repos["me/trained"]
    card = files["README.md"].decode()
    assert card.index("import hf_quantnoise") < card.index("## Quantization noise and compression")
    (tmp_path / "copy").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "copy" / name).write_bytes(files[name])
    AutoQuantizedModel.from_pretrained(tmp_path / "copy")
