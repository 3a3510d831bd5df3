#!/usr/bin/env python
"""Finetune a text classifier with quantization noise, compress it, save it and load it again.

A run finetunes with noise, evaluates, compresses stage by stage, saves, loads the compressed model,
checks that its logits are bit-equal, evaluates again and prints a closing table.

    python examples/run_glue.py --model_name_or_path roberta-base --task_name sst2 --output_dir out

    python examples/run_glue.py --model_name_or_path roberta-base \\
      --train_file train.csv --validation_file dev.csv --output_dir out \\
      --noise proxy --noise_rate 0.1 --block_size ffn=8,embeddings=8,attention=4

The run is implemented in ``hf_quantnoise.runs.glue``; ``hf-quantnoise finetune glue`` is the same.
Flags can also be passed as one JSON file.
"""

import sys

from hf_quantnoise.runs.glue import main, parse, run, script

__all__ = ["main", "parse", "run"]

if __name__ == "__main__":
    sys.exit(script())
