#!/usr/bin/env python
"""Finetunes a classifier with quantization noise, compresses it, saves it, loads it again.

One run: finetune with noise, evaluate, compress stage by stage, save, reload in a fresh model,
check that it answers bit for bit like the compressed one, evaluate again, print a closing table.

    python examples/run_glue.py --model_name_or_path roberta-base --task_name sst2 --output_dir out

    python examples/run_glue.py --model_name_or_path roberta-base \\
      --train_file train.csv --validation_file dev.csv --output_dir out \\
      --noise proxy --noise_rate 0.1 --block_size ffn=8,embeddings=8,attention=4

The run itself is ``hf_quantnoise.runs.glue``, which ``hf-quantnoise finetune glue`` starts too.
Flags can also be given as one JSON file.
"""

from hf_quantnoise.runs.glue import main, parse, run

__all__ = ["main", "parse", "run"]

if __name__ == "__main__":
    main()
