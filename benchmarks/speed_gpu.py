"""Speed of packed layers on a GPU, as a multiple of the speed of the dense layer in float32.

The variants of a case run in turn, in alternating order; ratios are medians over the rounds. Times
are those of events on the GPU. Weights are random, since time does not depend on them.

    python benchmarks/speed_gpu.py                                         # measure and print
    python benchmarks/speed_gpu.py --table --page docs/how_to/speed.md     # write the table there

Each case appends a line to ``--results``. Cases that are already there are not measured again.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable

import torch
from pages import add_table_arguments, show
from results_file import append_line, provenance, read_lines
from speed import BASE, relative_speeds
from torch import Tensor, nn

from hf_quantnoise.modeling import pack_layer
from hf_quantnoise.modeling.kernels import triton_products
from hf_quantnoise.quantizers import ProductQuantizer

RESULTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results", "speed_gpu.jsonl")
SHAPES = ((768, 3072), (4096, 4096), (4096, 14336))  # columns, rows
BLOCKS, INPUTS = (4, 8), (1, 4, 16, 64, 512)
RUNS = 20  # runs of a layer for each time


def variants(shape: tuple[int, int], block_size: int, seed: int) -> dict[str, nn.Module]:
    """Return the layers to compare, by name; the dense one comes first."""
    torch.manual_seed(seed)
    dense = nn.Linear(*shape)
    packed = copy.deepcopy(dense)
    pack_layer(packed, ProductQuantizer(block_size, 256, 16, n_iter=1))
    found: dict[str, nn.Module] = {}
    for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        found[f"dense {name}"] = copy.deepcopy(dense).to("cuda", dtype)
        found[f"packed, {name}"] = copy.deepcopy(packed).to("cuda", dtype)
        decoded = found[f"packed, {name}, decode only"] = copy.deepcopy(packed).to("cuda", dtype)
        decoded.kernels = ()
    compiled = copy.deepcopy(found["packed, bf16"])
    found["packed, bf16, CUDA graph"] = torch.compile(compiled, mode="reduce-overhead")
    return {name: layer.eval() for name, layer in found.items()}


def seconds(run: Callable[[], object]) -> float:
    """Return the time of a run on the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(RUNS):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / RUNS


@torch.inference_mode()
def measure(layers: dict[str, nn.Module], inputs: Tensor, repetitions: int) -> dict:
    """Return the time and the speed relative to the dense layer, with quartiles, by variant."""
    taken: dict[str, list[float]] = {name: [] for name in layers}
    dtypes = {name: torch.bfloat16 if "bf16" in name else torch.float32 for name in layers}
    own = {name: inputs.to("cuda", dtypes[name]) for name in layers}
    for repetition in range(-3, repetitions):  # the first ones compile and warm up
        for name in list(layers) if repetition % 2 else reversed(list(layers)):
            time = seconds(lambda name=name: layers[name](own[name]))
            if repetition >= 0:
                taken[name].append(time)
    return relative_speeds(taken)


def run_all(args: argparse.Namespace) -> None:
    """Measure every case that is not in the results file yet.

    Raises:
        RuntimeError: if the machine has no GPU that the kernel runs on.
    """
    if not triton_products.is_available():
        raise RuntimeError(
            "speed_gpu.py needs a CUDA GPU of compute capability 8.0, triton and a C compiler; on "
            "another machine, run it with --table for the rows that there are"
        )
    done = [line["key"] for line in read_lines(args.results)]
    for shape in SHAPES:
        for block_size in BLOCKS:
            layers = variants(shape, block_size, args.seed)
            for n_inputs in INPUTS:
                case = f"Linear {shape[0]} x {shape[1]}, blocks of {block_size}, {n_inputs} inputs"
                key = {"case": case, "repetitions": args.repetitions, "seed": args.seed}
                if key not in done:
                    inputs = torch.randn(n_inputs, shape[0])
                    figures = measure(layers, inputs, args.repetitions)
                    append_line(args.results, key, {"variants": figures})
                    print(f"{case}: done", flush=True)


def table(lines: list[dict]) -> str:
    """Return the results as a Markdown table."""
    if not lines:
        return "Not measured: no GPU."
    names = list(lines[0]["variants"])[1:]
    text = [f"| case | {BASE}, ms | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for line in lines:
        found = line["variants"]
        cells = [f"{found[name]['speed']:.2f}" for name in names]
        text.append(f"| {line['key']['case']} | {found[BASE]['ms']:.3g} | {' | '.join(cells)} |")
    return "\n".join([*text, "", *provenance(lines)])


def main(argv: list[str] | None = None) -> None:
    """Entry point; ``argv`` defaults to the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=15, help="rounds over all variants")
    parser.add_argument("--seed", type=int, default=0)
    add_table_arguments(parser, RESULTS)
    args = parser.parse_args(argv)
    if not args.table:
        run_all(args)
    show(args, "speed_gpu", table(read_lines(args.results)))


if __name__ == "__main__":
    main()
