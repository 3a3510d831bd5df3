"""A program for one process or several: trains with noise, compresses, and saves what each rank
has. Arguments: the folder, a name for the run, and its options as JSON."""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import load_from_disk
from safetensors.torch import save_file
from torch._dynamo.utils import counters
from transformers import AutoModelForSequenceClassification, TrainerCallback

from hf_quantnoise import CompressionArguments, IPQConfig, QuantNoiseConfig, QuantNoiseTrainer
from hf_quantnoise.compression import stages
from hf_quantnoise.modeling import packer
from hf_quantnoise.noise import find_state
from support.processes import take_cpus_for_gpus
from support.stacked import make_stacked, without_dropout
from support.trainers import Killed, tensors, training_arguments

WORLD, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))


class Watch(TrainerCallback):
    """Counts sharded parameters and compiled graphs at the end of each training."""

    def __init__(self):
        self.sharded, self.compiled = [], []

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.sharded.append(sum(hasattr(p, "full_tensor") for p in model.parameters()))
        self.compiled.append(counters["stats"]["unique_graphs"])
        counters.clear()


class KillAt(TrainerCallback):
    """Ends the process in the n-th stage, after a checkpoint."""

    def __init__(self, stage):
        self.stage = stage

    def on_save(self, args, state, control, **kwargs):
        if args.output_dir.endswith(f"run-{self.stage}"):
            raise Killed


def make_arguments(folder, options):
    settings = {
        "per_device_train_batch_size": 16 // WORLD, "save_strategy": "steps", "save_steps": 2,
        "optim": "sgd", "logging_steps": 1, **options.get("arguments", {}),
    }  # fmt: skip
    if WORLD > 1:
        settings = {"ddp_backend": "gloo", **settings}
    args = training_arguments(folder, **settings)
    if args.fsdp or "ACCELERATE_USE_FSDP" in os.environ:
        take_cpus_for_gpus(args)
    return args


def load_model(options):
    if "pretrained" in options:
        model = AutoModelForSequenceClassification.from_pretrained(options["pretrained"])
        return without_dropout(model)
    return make_stacked(options.get("model", "bert"), options.get("layers", 3))


def compress(trainer, watch, options):
    """Return the compressed model; None if the run was killed."""

    class Watched(stages.StageTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(watch)
            if "kill" in options:
                self.add_callback(KillAt(options["kill"]))

    stages.StageTrainer = Watched
    # All layers are packed by a stage, and files hold what is in memory.
    stored = {"codebook_bits": 32, "leftover_bits": 32}
    config = {"block_size": 4, "n_centroids": 16, **stored, **options.get("config", {})}
    try:
        return trainer.compress(
            IPQConfig(**config),
            CompressionArguments(**options["stages"]),
            resume_from_checkpoint=options.get("resume", False),
        )
    except Killed:
        return None


def main():
    torch.set_num_threads(1)
    folder, name, options = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])

    def save(tensors, part):
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, folder / f"{name}-{RANK}-{part}")

    args = make_arguments(folder / name, options)
    data = load_from_disk(str(folder / options.get("data", "data")))
    noise = QuantNoiseConfig(**options["noise"]) if "noise" in options else None
    model = load_model(options)
    trainer = QuantNoiseTrainer(
        model, args, noise, train_dataset=data, eval_dataset=data,
        teacher=make_stacked("bert", 3) if "teacher" in options else None,
    )  # fmt: skip
    watch, clustered = Watch(), []
    real = packer.pack_layer
    packer.pack_layer = lambda *args, **kwargs: clustered.append(None) or real(*args, **kwargs)
    trainer.add_callback(watch)
    trainer.evaluate()  # accelerate would then train without DDP and torch_compile
    if noise is not None:
        trainer.train(resume_from_checkpoint=options.get("checkpoint"))
        assert trainer.model is model  # not a sharded copy
        save(find_state(model).state_dict(), "noise")
        save(tensors(model), "dense")
    figures = {"logs": [log for log in trainer.state.log_history if "noise_p" in log]}
    if "stages" in options:
        small = compress(trainer, watch, options)
        if small is None:
            return
        save(tensors(small), "model")
        trainer.save_model(str(folder / f"{name}-saved"))
        errors = {k: v for r in trainer.compression_history for k, v in r["layer_errors"].items()}
        resumed = options.get("resume", False)
        assert resumed or abs(len(clustered) - len(errors) / WORLD) < 2, (clustered, errors)
        figures["errors"] = errors
        figures["losses"] = [r["metric"]["eval_loss"] for r in trainer.compression_history]
    figures |= {"sharded": watch.sharded, "compiled": watch.compiled}
    (folder / f"{name}-{RANK}-figures").write_text(json.dumps(figures))


main()
