"""run_glue.py on two processes gives the same model as on one, with each launcher."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.processes import accelerate_launch, needs_gloo, torchrun
from transformers import BertConfig

from hf_quantnoise.runs.glue import main

PROGRAM = Path(__file__).parents[2] / "examples" / "run_glue.py"


@pytest.fixture
def words(tiny_model, tmp_path, write_sets):
    """Its command line: 4 steps of 16 examples, without dropout or random noise."""
    config = BertConfig.from_pretrained(tiny_model)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    config.save_pretrained(tmp_path / "config")
    files = write_sets("csv", names=("dull", "great"))

    def command(out: str, processes: int) -> list[str]:
        flags = {
            "model_name_or_path": tiny_model, "config_name": tmp_path / "config",
            "output_dir": tmp_path / out, "num_train_epochs": 1, "learning_rate": 1e-3,
            "per_device_train_batch_size": 16 // processes, "use_cpu": True, "optim": "sgd",
            "disable_tqdm": True, "noise": "int8", "noise_rate": 1, "stages": "ffn",
            "stage_epochs": 1, "n_centroids": 8, "block_size": 4, "logging_steps": 1,
            "metrics": "sklearn",
        }  # fmt: skip
        return [word for name, v in flags.items() for word in (f"--{name}", str(v))] + files

    return command


@pytest.mark.slow
@needs_gloo
def test_two_processes_give_the_model_of_one(words, tmp_path):
    main(words("one", 1))
    single = json.loads((tmp_path / "one" / "results.json").read_text())
    model = load_file(tmp_path / "one" / "compressed" / "model.safetensors")
    launchers = {"torchrun": torchrun, "accelerate": partial(accelerate_launch, tmp_path)}
    for name, launcher in launchers.items():
        printed = launcher(PROGRAM, *words(name, 2))
        results = json.loads((tmp_path / name / "results.json").read_text())
        stages = results["compressed"]["stages"]
        assert [stage["stage"] for stage in stages] == ["latent weights", "ffn"]
        # 64 examples are four steps with a batch of eight on each of two processes.
        assert [stage["step"] for stage in stages] == [4, 8]
        assert results["arguments"]["training"]["per_device_train_batch_size"] == 8
        assert results["reloaded"]["logits_bit_equal"] is True
        loss = results["dense"]["metrics"]["loss"]
        assert loss == pytest.approx(single["dense"]["metrics"]["loss"], rel=1e-4)
        other = load_file(tmp_path / name / "compressed" / "model.safetensors")
        for key, tensor in model.items():
            if tensor.is_floating_point():
                torch.testing.assert_close(other[key], tensor, rtol=5e-3, atol=2e-4)
        # Printed once, by the first process.
        assert printed.count("compressed, reloaded") == 1
