"""A program for one process or several: trains with noise, then compresses; leaves what each rank
has. Arguments: the folder, a name for the run, and its options as JSON."""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import load_from_disk
from safetensors.torch import save_file
from torch._dynamo.utils import counters
from transformers import (
    AutoModelForSequenceClassification,
    TrainerCallback,
    TrainingArguments,
)

from hf_quantnoise import CompressionArguments, IPQConfig, QuantNoiseConfig, QuantNoiseTrainer
from hf_quantnoise.compression import stages
from hf_quantnoise.compression.checkpoints import in_memory_tensors
from hf_quantnoise.hub import packer
from hf_quantnoise.noise import find_state
from support.processes import take_cpus_for_gpus
from support.stacked import make_stacked, without_dropout

WORLD, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))


class Watch(TrainerCallback):
    """Counts, at the end of each training, what was sharded and what was compiled."""

    def __init__(self):
        self.sharded, self.compiled = [], []

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.sharded.append(sum(hasattr(p, "full_tensor") for p in model.parameters()))
        self.compiled.append(counters["stats"]["unique_graphs"])
        counters.clear()


class Killed(Exception):
    """Stands for a SIGKILL."""


class KillAt(TrainerCallback):
    """Ends the process in the n-th stage, after a checkpoint."""

    def __init__(self, stage):
        self.stage = stage

    def on_save(self, args, state, control, **kwargs):
        if args.output_dir.endswith(f"run-{self.stage}"):
            raise Killed


def arguments_of(folder, name, options):
    settings = {
        "output_dir": str(folder / name), "per_device_train_batch_size": 16 // WORLD,
        "learning_rate": 1e-3, "report_to": "none", "save_strategy": "steps", "save_steps": 2,
        "disable_tqdm": True, "use_cpu": True, "num_train_epochs": 1, "ddp_backend": "gloo",
        "optim": "sgd", "logging_steps": 1, **options.get("arguments", {}),
    }  # fmt: skip
    if WORLD == 1:
        del settings["ddp_backend"]
    args = TrainingArguments(**settings)
    sharded = args.fsdp or "ACCELERATE_USE_FSDP" in os.environ
    if sharded and not options.get("on_cpus"):
        take_cpus_for_gpus(args)
    return args


def main():
    torch.set_num_threads(1)
    folder, name, options = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    data = load_from_disk(str(folder / options.get("data", "data")))
    args = arguments_of(folder, name, options)
    if "pretrained" in options:
        model = AutoModelForSequenceClassification.from_pretrained(options["pretrained"])
        model = without_dropout(model)
    else:
        model = make_stacked(options.get("model", "bert"), options.get("layers", 3))
    trainer = QuantNoiseTrainer(
        model,
        args,
        QuantNoiseConfig(**options["noise"]) if "noise" in options else None,
        train_dataset=data,
        eval_dataset=data,
    )
    watch, clustered = Watch(), []
    real = packer.pack_layer
    packer.pack_layer = lambda *args, **kwargs: clustered.append(None) or real(*args, **kwargs)
    trainer.add_callback(watch)
    trainer.evaluate()  # accelerate would leave DDP and torch_compile out of what follows
    if "noise" in options:
        trainer.train(resume_from_checkpoint=options.get("checkpoint"))
        assert trainer.model is model  # the very object, whole and with its own classes
        fitted = find_state(model).state_dict()
        save_file({k: v.contiguous() for k, v in fitted.items()}, folder / f"{name}-{RANK}-noise")
        dense = {k: v.contiguous() for k, v in in_memory_tensors(model).items()}
        save_file(dense, folder / f"{name}-{RANK}-dense")
    figures = {"logs": [log for log in trainer.state.log_history if "noise_p" in log]}
    if "stages" in options:
        small = compress(trainer, watch, options)
        if small is None:
            return
        tensors = {k: v.clone() for k, v in in_memory_tensors(small).items()}
        save_file(tensors, folder / f"{name}-{RANK}-model")
        trainer.save_model(str(folder / f"{name}-saved"))
        errors = {k: v for r in trainer.compression_history for k, v in r["layer_errors"].items()}
        resumed = options.get("resume", False)
        assert resumed or abs(len(clustered) - len(errors) / WORLD) < 2, (clustered, errors)
        figures["errors"] = errors
        figures["losses"] = [r["metric"]["eval_loss"] for r in trainer.compression_history]
    figures |= {"sharded": watch.sharded, "compiled": watch.compiled}
    (folder / f"{name}-{RANK}-figures").write_text(json.dumps(figures))


def compress(trainer, watch, options):
    """The pass; None where it was "killed"."""

    class Watched(stages.StageTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(watch)
            if "kill" in options:
                self.add_callback(KillAt(options["kill"]))

    stages.StageTrainer = Watched
    config = {"block_size": 4, "n_centroids": 16, **options.get("config", {})}
    try:
        return trainer.compress(
            IPQConfig(**config),
            CompressionArguments(**options["stages"]),
            resume_from_checkpoint=options.get("resume", False),
        )
    except Killed:
        return None


main()
