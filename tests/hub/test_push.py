"""Pushing to and loading from a local server with the endpoints of the Hub.

Scripts run in separate processes: huggingface_hub reads HF_ENDPOINT once, at import.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from support.hub_server import hub_environment
from support.tiny import VOCABULARY

from hf_quantnoise import AutoQuantizedModel

HEADER = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parents[1])]!r}
import json, torch
torch.set_num_threads({torch.get_num_threads()})
from huggingface_hub import HfApi
from support.tiny import make_model
from support.words import words
from hf_quantnoise import *
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments, pipeline
folder = sys.argv[1]
ids = torch.arange(5, {VOCABULARY}, 7).reshape(3, -1)
text = "w7 w8 w300 w12"
"""

PUSH = """
model = quantize_model(make_model("bert"), IPQConfig(n_centroids=16), progress=False)
model.save_pretrained(folder)
with torch.no_grad():
    torch.save(model(ids).logits, folder + "/expected")

card = QuantNoiseCard(base_model="google-bert/bert-base-uncased", after={"eval_accuracy": 0.75})
push_to_hub(model, "me/small", card=card)
model.push_to_hub("me/small", tags=["later"])  # transformers' own, to where our card is
push_to_hub(model, "me/small", revision="sharded", max_shard_size="8KB")
model.push_to_hub("me/plain")

reader = words()
push_to_hub(model, "me/words", processing_class=reader)
with torch.no_grad():
    torch.save(model(**reader(text, return_tensors="pt")).logits[0], folder + "/scores")

HfApi().create_repo("me/written")
HfApi().upload_file(
    path_or_fileobj=b"---\\nlicense: mit\\n---\\nWords of mine.", path_in_repo="README.md",
    repo_id="me/written",
)
push_to_hub(model, "me/written")
HfApi().upload_folder(repo_id="me/written", folder_path=folder, path_in_repo="in/side")

QuantNoiseConfig(p=0.25).push_to_hub("me/noise")
QuantNoiseConfig(p=0.5).push_to_hub("me/noise", revision="half")
QuantNoiseConfig(p=0.25).push_to_hub("me/small")
IPQConfig(n_centroids=16).push_to_hub("me/settings")
"""

LOAD = """
def logits(loader, *args, **kwargs):
    with torch.no_grad():
        return loader.from_pretrained(*args, **kwargs)(ids).logits

loads = {
    "auto": (AutoQuantizedModel, "me/small", {}),
    "transformers": (AutoModelForSequenceClassification, "me/small", {}),
    "revision": (AutoQuantizedModel, "me/small", {"revision": "sharded"}),
    "subfolder": (AutoQuantizedModel, "me/written", {"subfolder": "in/side"}),
    "cached": (AutoQuantizedModel, "me/small", {"local_files_only": True}),
}
for name, (loader, repo, kwargs) in loads.items():
    torch.save(logits(loader, repo, **kwargs), folder + "/" + name)
classify = pipeline(
    "text-classification", model="me/words", device="cpu", top_k=None, function_to_apply="none"
)
(answer,) = classify([text])
scores = {score["label"]: score["score"] for score in answer}
labels = [classify.model.config.id2label[number] for number in range(len(scores))]
torch.save(torch.tensor([scores[label] for label in labels]), folder + "/answer")
found = {
    "noise": QuantNoiseConfig.from_pretrained("me/noise").p,
    "half": QuantNoiseConfig.from_pretrained("me/noise", revision="half").p,
    "settings": IPQConfig.from_pretrained("me/settings").n_centroids,
}
for repo in ("me/settings", "me/nowhere"):
    try:
        QuantNoiseConfig.from_pretrained(repo)
    except FileNotFoundError as error:
        found[repo] = str(error)
try:
    FixedPointConfig.from_pretrained("me/settings")
except TypeError as error:
    found["other class"] = str(error)
with open(folder + "/found.json", "w") as file:
    json.dump(found, file)
"""

TRAINER_PUSH = """
from datasets import Dataset
data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": [0, 1, 1]})
trainer = QuantNoiseTrainer(
    make_model("bert"),
    TrainingArguments(folder + "/run", hub_model_id="me/trained", use_cpu=True, report_to="none"),
    QuantNoiseConfig(p=0.1),
    train_dataset=data,
    eval_dataset=data,
    compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    processing_class=words(),
)
settings = CompressionArguments(stage_epochs=0, plots=False)
small = trainer.compress(IPQConfig(n_centroids=16), settings)
trainer.push_to_hub(dataset="three lines", finetuned_from="google-bert/bert-base-uncased")
trainer.save_model(folder + "/saved")
push_to_hub(small, "me/by-hand")
small.push_to_hub("me/by-transformers")

# The pushed tokenizer is used, and travels on with the loaded model.
texts = [text, "w9 w10", "w11"]
with torch.no_grad():
    scores = [small(**words()(each, return_tensors="pt")).logits[0].tolist() for each in texts]
for repo in ("me/trained", "me/by-hand", "me/by-transformers"):
    classify = pipeline(
        "text-classification", model=repo, device="cpu", top_k=None, function_to_apply="none"
    )
    for answers, expected in zip(classify(texts), scores, strict=True):
        assert sorted(answer["score"] for answer in answers) == sorted(expected), repo
    classify.model.save_pretrained(folder + "/" + repo)

# Shards replace a single file, and the other way round.
push_to_hub(small, "me/reshaped")
push_to_hub(small, "me/reshaped", max_shard_size="8KB")
assert torch.equal(AutoQuantizedModel.from_pretrained("me/reshaped")(ids).logits, small(ids).logits)
HfApi().create_branch("me/reshaped", branch="sharded")
push_to_hub(small, "me/reshaped")
"""

PLAIN_TRAINER = """
from datasets import Dataset
model = AutoModelForSequenceClassification.from_pretrained("me/small")
trainer = Trainer(
    model,
    TrainingArguments(
        folder, hub_model_id="me/went-on", use_cpu=True, report_to="none", max_steps=1,
        learning_rate=0.00025, save_strategy="no",
    ),
    train_dataset=Dataset.from_dict({"input_ids": ids.tolist(), "labels": [0, 1, 1]}),
)
trainer.train()
trainer.push_to_hub()
torch.save(model.eval()(ids).logits.detach(), folder + "/expected")
model = AutoQuantizedModel.from_pretrained("me/went-on")
torch.save(model(ids).logits.detach(), folder + "/found")
HfApi().create_branch("me/went-on", branch="both")
push_to_hub(model, "me/went-on", revision="both")
"""


@pytest.fixture(scope="module")
def run(hub, tmp_path_factory):
    def run(script, folder):
        cache = str(tmp_path_factory.mktemp("cache"))
        result = subprocess.run(
            [sys.executable, "-c", HEADER + script, str(folder)],
            env=hub_environment(hub.url, cache),
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr[-3000:]

    return run


@pytest.fixture(scope="module")
def pushed(run, tmp_path_factory):
    """Return the folder of the pushed model."""
    folder = tmp_path_factory.mktemp("pushed")
    run(PUSH, folder)
    return folder


@pytest.fixture(scope="module")
def loaded(run, pushed):
    """Return the same folder, with the results of a process that loaded with an empty cache."""
    run(LOAD, pushed)
    return pushed


def card(hub, repo, branch=None):
    files = hub.repos[repo] if branch is None else hub.branches[repo, branch]
    return ModelCard(files["README.md"].decode())


def test_push_uploads_files_of_save_pretrained(hub, pushed):
    files = hub.repos["me/small"]
    assert files["model.safetensors"] == (pushed / "model.safetensors").read_bytes()
    sharded = hub.branches["me/small", "sharded"]
    assert sum(name.startswith("model-") for name in sharded) > 1


@pytest.mark.parametrize("name", ["auto", "transformers", "revision", "subfolder", "cached"])
def test_loading_from_hub_gives_pushed_logits(loaded, name):
    assert torch.equal(torch.load(loaded / name), torch.load(loaded / "expected"))


def test_pipeline_from_hub_gives_pushed_scores(loaded):
    scores = torch.load(loaded / "scores")
    assert scores.std() > 0 and torch.equal(torch.load(loaded / "answer"), scores)


def test_card_has_loading_code_and_results(hub, pushed):
    small = card(hub, "me/small")
    assert 'pipeline("text-classification", model="me/small"' in small.text
    assert small.text.index("import hf_quantnoise") < small.text.index("## Results")
    data = small.data
    assert (data.base_model, data.base_model_relation) == (
        "google-bert/bert-base-uncased",
        "quantized",
    )
    assert data.library_name == "hf-quantnoise" and data.pipeline_tag == "text-classification"
    result = data.eval_results[0]
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.75)


def test_push_by_transformers_keeps_existing_card(hub, pushed):
    small = card(hub, "me/small")
    assert {"quant-noise", "import-hf_quantnoise", "later"} <= set(small.data.tags)
    assert small.text.count("## Results") == 1
    assert "quant_noise_config.json" in hub.repos["me/small"]  # also after the push of a config
    # Without a card transformers writes its own, with our tags.
    plain = card(hub, "me/plain")
    assert {"quant-noise", "import-hf_quantnoise"} <= set(plain.data.tags)
    assert "<!-- hf_quantnoise -->" not in plain.text


def test_push_keeps_text_and_metadata_of_user_card(hub, pushed):
    written = card(hub, "me/written")
    assert written.text.rstrip().endswith("Words of mine.") and written.data.license == "mit"
    assert written.text.index("import hf_quantnoise") < written.text.index("Words of mine.")
    assert "eval_results" not in written.data.to_dict() and "model-index" not in str(written)
    assert "base_model" not in written.data.to_dict()


def test_configs_round_trip_through_hub(hub, loaded):
    found = json.loads((loaded / "found.json").read_text())
    assert (found["noise"], found["half"], found["settings"]) == (0.25, 0.5, 16)
    assert "quant_noise_config.json is missing" in found["me/settings"]
    assert "RepositoryNotFoundError" in found["me/nowhere"]
    assert "IPQConfig.from_pretrained" in found["other class"]
    text = card(hub, "me/noise").text
    assert 'QuantNoiseConfig.from_pretrained("me/noise")' in text and '"p": 0.25' in text
    assert "transformers model" not in text


def test_trainer_pushes_model_and_card_only(hub, run, tmp_path):
    run(TRAINER_PUSH, tmp_path)
    files = hub.repos["me/trained"]
    assert (tmp_path / "run" / "compression").is_dir(), "the run stores the dense model there"
    assert not any(name.startswith(("compression/", "checkpoint-")) for name in files)
    trained, by_hand = card(hub, "me/trained"), card(hub, "me/by-hand")
    assert 'model="me/trained")' in trained.text
    assert 'model="me/by-hand")' in by_hand.text
    assert trained.data.library_name == by_hand.data.library_name == "hf-quantnoise"
    for each in (trained, by_hand):
        assert each.text.index("import hf_quantnoise") < each.text.index("## Results")
        assert "Finetuned with `proxy` at rate 0.1." in each.text
        assert each.data.eval_results[0].metric_type == "accuracy"
    assert trained.data.eval_results[0].dataset_name == "three lines"
    assert trained.data.base_model_relation == "quantized"
    for repo in ("me/trained", "me/by-hand", "me/by-transformers"):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / repo / name).read_bytes() == hub.repos[repo][name], "was cached"
    assert "model.safetensors" in hub.repos["me/reshaped"]
    assert not any("-of-" in name or "index" in name for name in hub.repos["me/reshaped"])
    assert "model.safetensors" not in hub.branches["me/reshaped", "sharded"]
    saved = tmp_path / "saved"
    assert "import hf_quantnoise" in (saved / "README.md").read_text()
    AutoQuantizedModel.from_pretrained(saved)


def test_stock_trainer_pushes_packed_model(hub, run, pushed, tmp_path):
    """transformers writes its card with our tags; our push puts our text before it."""
    run(PLAIN_TRAINER, tmp_path)
    assert torch.equal(torch.load(tmp_path / "found"), torch.load(tmp_path / "expected"))
    assert not torch.equal(torch.load(tmp_path / "found"), torch.load(pushed / "expected"))
    stored = json.loads(hub.repos["me/went-on"]["config.json"])["quantization_config"]
    assert stored["quant_method"] == "hf_quantnoise" and stored["how_to_load"]
    theirs = card(hub, "me/went-on")
    assert {"quant-noise", "import-hf_quantnoise"} <= set(theirs.data.tags)
    assert theirs.data.base_model == "me/small" and "0.00025" in theirs.text
    assert "<!-- hf_quantnoise -->" not in theirs.text
    both = card(hub, "me/went-on", "both")
    assert both.text.index("import hf_quantnoise") < both.text.index("0.00025")
    assert both.text.count("## Size") == 1
