#!/usr/bin/env python
"""Finetune a causal language model with quantization noise, compress it and load it again.

    python examples/run_clm.py --model_name_or_path gpt2 --train_file train.txt \\
      --validation_file valid.txt --sequence_length 512 --output_dir out

    python examples/run_clm.py --model_name_or_path gpt2 --dataset_name Salesforce/wikitext \\
      --dataset_config_name wikitext-2-raw-v1 --output_dir out

Text is tokenized as one stream and split into examples of equal length. The closing table has the
perplexity per token of the model's tokenizer. ``results.json`` also has the perplexity per word,
as reported for WikiText in the literature.

The run is implemented in ``hf_quantnoise.runs.clm``; ``hf-quantnoise finetune clm`` is the same.
Flags can also be passed as one JSON file.
"""

import sys

from hf_quantnoise.runs.clm import main, parse, run, script

__all__ = ["main", "parse", "run"]

if __name__ == "__main__":
    sys.exit(script())
