#!/usr/bin/env python
"""Finetune an image classifier with quantization noise, compress it and load it again.

    python examples/run_image_classification.py --dataset_name uoft-cs/cifar10 --image_column img \\
      --model_name_or_path google/mobilenet_v1_0.75_192 --ignore_mismatched_sizes \\
      --stages conv head --block_size 4 --output_dir out

    python examples/run_image_classification.py --train_file train.parquet \\
      --validation_file test.parquet --model_name_or_path a/checkpoint \\
      --stages conv --output_dir out

Files are parquet with a column of images (encoded bytes, or ``datasets.Image``) and one of labels.
Convolutions have the paper's blocks: ``--block_size`` for 1 x 1 kernels, the area of larger ones.

The run is implemented in ``hf_quantnoise.runs.images``; ``hf-quantnoise finetune images`` is the
same. Flags can also be passed as one JSON file.
"""

import sys

from hf_quantnoise.runs.images import main, parse, run, script

__all__ = ["main", "parse", "run"]

if __name__ == "__main__":
    sys.exit(script())
