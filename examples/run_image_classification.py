#!/usr/bin/env python
"""Finetunes an image classifier with quantization noise, compresses it, loads it again.

    python examples/run_image_classification.py --dataset_name uoft-cs/cifar10 --image_column img \\
      --model_name_or_path google/mobilenet_v1_0.75_192 --ignore_mismatched_sizes \\
      --stages conv head --block_size 4 --output_dir out

    python examples/run_image_classification.py --train_file train.parquet \\
      --validation_file test.parquet --model_name_or_path a/checkpoint \\
      --stages conv --output_dir out

Files are parquet with a column of images (encoded bytes, or datasets' own Image) and one of labels.
Convolutions have the paper's blocks: ``--block_size`` for 1 x 1 ones, the area of larger kernels.

The run itself is ``hf_quantnoise.runs.images``, which ``hf-quantnoise finetune images`` starts too.
Flags can also be given as one JSON file.
"""

from hf_quantnoise.runs.images import main, parse, run

__all__ = ["main", "parse", "run"]

if __name__ == "__main__":
    main()
