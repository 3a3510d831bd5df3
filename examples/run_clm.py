#!/usr/bin/env python
"""Finetunes a causal language model with quantization noise, compresses it, loads it again.

    python examples/run_clm.py --model_name_or_path gpt2 --train_file train.txt \\
      --validation_file valid.txt --sequence_length 512 --output_dir out

    python examples/run_clm.py --model_name_or_path gpt2 --dataset_name Salesforce/wikitext \\
      --dataset_config_name wikitext-2-raw-v1 --output_dir out

Text is tokenized as one stream and cut into pieces of equal length. The closing table gives the
perplexity per token of the model's own tokenizer, and ``results.json`` the one per word too, which
the literature gives for WikiText (words are what white space separates, and each line's end).

The run itself is ``hf_quantnoise.runs.clm``, which ``hf-quantnoise finetune clm`` starts too.
Flags can also be given as one JSON file.
"""

from hf_quantnoise.runs.clm import main, parse, run

__all__ = ["main", "parse", "run"]

if __name__ == "__main__":
    main()
