#!/usr/bin/env python
"""Supervised finetuning with TRL's ``SFTTrainer`` and quantization noise, then compression.

    python examples/sft_with_noise.py --output_dir out
    python examples/sft_with_noise.py --model_name_or_path gpt2 --train_file train.jsonl \\
      --validation_file valid.jsonl --max_length 256 --output_dir out

The noise is a callback. ``compress`` is a method of ``QuantNoiseTrainer``, so the finetuned model
is quantized in one shot, and a second ``SFTTrainer`` finetunes its centroids and dense layers.
Files have the columns of SFTTrainer: ``text``, or ``messages``, or ``prompt`` and ``completion``.
All flags of ``SFTConfig`` are accepted; its default is mixed precision with bfloat16, where the
hardware has it. Requires ``pip install hf-quantnoise[examples,trl]``.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from trainer_data import RowFlags
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig, SFTTrainer

from hf_quantnoise import QuantNoiseCallback, quantize_model, remove_quant_noise
from hf_quantnoise.runs.closing_table import Row, closing_table, weights_mb
from hf_quantnoise.runs.config_flags import ConfigFlags
from hf_quantnoise.runs.script import ScriptParser, run_script
from hf_quantnoise.runs.tokenizers import load_tokenizer


@dataclass
class SftFlags(RowFlags):
    """Model and data."""

    model_name_or_path: str = field(
        default="HuggingFaceTB/SmolLM2-135M-Instruct",
        metadata={"help": "Checkpoint: a folder or a Hub repository."},
    )
    dataset_name: str = field(
        default="trl-lib/Capybara", metadata={"help": "Dataset on the Hub, if there are no files."}
    )


@dataclass
class SftArguments(SFTConfig):
    """``SFTConfig`` whose defaults also work without a GPU, or with one that lacks bfloat16.

    TRL trains in bfloat16 (mixed precision) unless ``--bf16`` or ``--fp16`` is passed.
    """

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            self.use_cpu = True  # required for bfloat16 there
        elif self.bf16 is None and not self.use_cpu and not is_torch_bf16_gpu_available():
            self.bf16 = False
        super().__post_init__()


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    """Return the logits of the first tokens of the vocabulary, in the precision of the weights.

    The model is moved to the CPU, since a GPU rounds differently. The forward of the class is
    called, since a trainer replaces that of its model, for example by one in mixed precision.
    """
    ids = torch.arange(min(32, model.config.vocab_size))[None]
    return type(model).forward(model.cpu().eval(), input_ids=ids).logits


def read_texts(flags: SftFlags, name: str, text: str) -> Dataset:
    """Return the data of ``"train"`` or ``"validation"``; raise if SFTTrainer cannot read them.

    Args:
        flags: name the data.
        name: of the split.
        text: column of plain text.
    """
    rows, source = flags.read(name), getattr(flags, f"{name}_file") or flags.dataset_name
    if not {text, "messages", "conversations", "prompt", "input_ids"} & {*rows.column_names}:
        raise ValueError(
            f"{source} has the columns {', '.join(rows.column_names)}, expected {text}, messages, "
            "or prompt and completion; rename one, or pass --dataset_text_field"
        )
    return rows


def make_parser() -> ScriptParser:
    """Return the parser of the command line."""
    kinds = [SftFlags, ConfigFlags, SftArguments]
    return ScriptParser(kinds, description=__doc__.splitlines()[0])


def main(argv: list[str] | None = None) -> list[Row]:
    """Run the example; return the rows of its closing table.

    Raises:
        RuntimeError: if the loaded model has other logits than the saved one.
    """
    flags, compression, training = make_parser().parse_args_into_dataclasses(argv)
    flags.check(training)
    noise_config = compression.noise_config(training.seed)
    small_config = compression.config(training.seed)
    dense, compressed = (os.path.join(training.output_dir, n) for n in ("dense", "compressed"))
    tokenizer = load_tokenizer("model_name_or_path", flags.model_name_or_path)
    with flags.errors_name_model():
        model = AutoModelForCausalLM.from_pretrained(flags.model_name_or_path, dtype="float32")
    flags.require_dense(model)
    data = {
        "train_dataset": read_texts(flags, "train", training.dataset_text_field),
        "eval_dataset": read_texts(flags, "validation", training.dataset_text_field),
        "processing_class": tokenizer,
    }

    callbacks = [QuantNoiseCallback(noise_config)] if noise_config else []
    trainer = SFTTrainer(model, training, callbacks=callbacks, **data)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    dense_loss = trainer.evaluate()["eval_loss"]
    remove_quant_noise(trainer.model)
    trainer.save_model(dense)

    # Loaded again, since SFTTrainer replaces the forward of its model.
    small = quantize_model(AutoModelForCausalLM.from_pretrained(dense), small_config)
    second = flags.for_centroids(training)
    trainer = SFTTrainer(small, second, **data)
    one_shot_loss = trainer.evaluate()["eval_loss"]
    if flags.centroid_epochs > 0:
        trainer.train()
    small.save_pretrained(compressed)
    tokenizer.save_pretrained(compressed)

    fresh = AutoModelForCausalLM.from_pretrained(compressed)
    if not torch.equal(logits(fresh), logits(small)):
        raise RuntimeError("the loaded model has other logits than the saved one")
    reloaded_loss = SFTTrainer(fresh, second, **data).evaluate()["eval_loss"]
    small_mb = weights_mb(compressed)
    rows = [
        Row("finetuned, float32", weights_mb(dense), dense_loss),
        Row("quantized in one shot", small_mb, one_shot_loss),
        Row("centroids finetuned, loaded", small_mb, reloaded_loss),
    ]
    print(f"\n{closing_table(rows, 'loss per token')}")
    return rows


if __name__ == "__main__":
    sys.exit(run_script(main, make_parser()))
