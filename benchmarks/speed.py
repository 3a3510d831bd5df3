"""Speed of packed models, as a multiple of the speed of the dense float32 model.

The variants of a case run in turn, in alternating order, so that a drift of the machine affects all
of them; ratios are medians over the rounds. Weights are random, since time does not depend on them.

    python benchmarks/speed.py --threads 1 2                                # measure and print
    python benchmarks/speed.py --table --page docs/how_to/speed.md          # write the tables there

Each case appends a line to ``--results``. Cases that are already there are not measured again.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from pages import add_table_arguments, show
from results_file import append_line, provenance, read_lines
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from hf_quantnoise import IPQConfig, optimize_for_inference, quantize_model
from hf_quantnoise.modeling import pack_layer, packed_layers
from hf_quantnoise.quantizers import ProductQuantizer

RESULTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results", "speed.jsonl")
BASE = "dense float32"
LINEAR, ROWS, BLOCKS = (768, 3072), (1, 4, 8, 16, 64, 512), (4, 8)
FORMS = ("float32", "bf16", "int8")
SHAPES = {"minilm": ("1x16", "1x128", "32x128"), "tiny": ("1x8",)}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
# A run of a few microseconds is repeated for this time, in seconds.
SHORTEST = 0.01


@dataclass(frozen=True)
class Subject:
    """A model or layer to measure.

    Attributes:
        build: returns it, dense and with random weights.
        pack: packs it in place; with True in integers, for int8 products.
        run: runs it once.
        per_run: units of work of a run (generated tokens), by which its time is divided.
    """

    build: Callable[[], nn.Module]
    pack: Callable[[nn.Module, bool], None]
    run: Callable[[nn.Module], object]
    per_run: int = 1


def linear(rows: int, block_size: int) -> Subject:
    """Return a Linear on some rows of inputs."""
    inputs = torch.randn(rows, LINEAR[0])

    def pack(model: nn.Module, integers: bool) -> None:
        bits = 8 if integers else 16
        quantizer = ProductQuantizer(block_size, 256, bits, n_iter=1)
        pack_layer(model[0], quantizer, activation_bits=8 if integers else None)
        if integers:
            model[0].input_scale.fill_(8 / 255)
            model[0].input_zero_point.fill_(128)

    def run(model: nn.Module) -> object:
        dtype = next((tensor.dtype for tensor in model.parameters()), torch.float32)
        return model(inputs.to(dtype))

    return Subject(lambda: nn.Sequential(nn.Linear(*LINEAR)), pack, run)


def pack_model(model: nn.Module, integers: bool) -> None:
    """Pack a model with the default blocks: 8 values in the FFN and tables, 4 in attention."""
    n_centroids = 256 if model.config.vocab_size > 1000 else 16
    config = IPQConfig(n_centroids=n_centroids, kmeans_iter=1)
    data = None
    if integers:
        config.codebook_bits, config.activation_bits = 8, 8
        data = [{"input_ids": torch.randint(5, model.config.vocab_size, (4, 32))}]
    quantize_model(model, config, calibration_data=data, progress=False)


def encoder(name: str, shape: str) -> Subject:
    """Return a BERT classifier on (batch x length) random tokens."""
    sizes = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
    if name == "tiny":
        sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64,
                 "vocab_size": 512}  # fmt: skip
    config = BertConfig(num_hidden_layers=6 if name == "minilm" else 1, **sizes)
    batch, length = map(int, shape.split("x"))
    ids = torch.randint(5, config.vocab_size, (batch, length))
    return Subject(
        lambda: BertForSequenceClassification(config), pack_model, lambda model: model(ids)
    )


def gpt2(tokens: int) -> Subject:
    """Return a GPT-2 shape that generates some tokens, one by one, after 16 others."""
    config = GPT2Config(n_layer=6, n_embd=512, n_head=8)
    ids = torch.randint(5, config.vocab_size, (1, 16))
    options = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens}

    def run(model: nn.Module) -> object:
        return model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)

    return Subject(lambda: GPT2LMHeadModel(config), pack_model, run, tokens)


def cases(names: list[str]) -> dict[str, Callable[[], Subject]]:
    """Return the cases of the named groups."""
    found: dict[str, Callable[[], Subject]] = {}
    for name in names:
        if name == "linear":
            for block_size in BLOCKS:
                for rows in ROWS:
                    label = f"Linear {LINEAR[0]} x {LINEAR[1]}, blocks of {block_size}, {rows} rows"
                    found[label] = lambda rows=rows, block_size=block_size: linear(rows, block_size)
        elif name == "gpt2":
            found["GPT-2 (6 x 512), per generated token"] = lambda: gpt2(16)
        else:
            for shape in SHAPES[name]:
                label = f"{'MiniLM' if name == 'minilm' else name}, {shape} tokens"
                found[label] = lambda name=name, shape=shape: encoder(name, shape)
    return found


def torch_int8(model: nn.Module) -> nn.Module:
    """Return a dense model with torch's dynamic int8 layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def variants(subject: Subject, seed: int) -> dict[str, nn.Module]:
    """Return the models to compare, by name; the dense one comes first."""
    torch.manual_seed(seed)
    dense = subject.build().eval()
    packed, integers = copy.deepcopy(dense), copy.deepcopy(dense)
    subject.pack(packed, False)
    subject.pack(integers, True)
    decoded = copy.deepcopy(packed)
    for _, layer in packed_layers(decoded):
        layer.kernels = ()
    found = {
        BASE: dense,
        "dense bf16": copy.deepcopy(dense).to(torch.bfloat16),
        "torch dynamic int8": torch_int8(dense),
        "packed, decode only": decoded,
        "packed": packed,
        "packed, bf16": copy.deepcopy(packed).to(torch.bfloat16),
        "packed, int8": integers,
    }
    for form in FORMS:
        found[f'optimized, "{form}"'] = optimize_for_inference(copy.deepcopy(packed), form)
    return {name: model.eval() for name, model in found.items()}


@torch.inference_mode()
def measure(
    subject: Subject, models: dict[str, nn.Module], repetitions: int, clock: Callable[[], float]
) -> dict:
    """Return the time and the speed relative to the dense model, with quartiles, by variant."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    number = {}
    for name, model in models.items():
        subject.run(model)  # warm up
        start = clock()
        subject.run(model)
        number[name] = max(1, int(SHORTEST / (clock() - start)))
    for repetition in range(repetitions):
        for name in list(models) if repetition % 2 else reversed(list(models)):
            start = clock()
            for _ in range(number[name]):
                subject.run(models[name])
            seconds[name].append((clock() - start) / number[name] / subject.per_run)
    figures = {}
    for name, times in seconds.items():
        ratios = [base / own for base, own in zip(seconds[BASE], times, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if repetitions > 1 else ratios * 3
        figures[name] = {
            "ms": 1000 * statistics.median(times),
            "speed": middle,
            "quartiles": [low, high],
            "bytes": sum(t.nbytes for t in tensors_of(models[name])),
        }
    return figures


def tensors_of(model: nn.Module) -> list[torch.Tensor]:
    """Return the tensors of a model in memory, tied ones once; torch's int8 weights are hidden."""
    found = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        if hasattr(module, "_packed_params") and callable(getattr(module, "weight", None)):
            found[id(module)] = module.weight()
        elif isinstance(getattr(module, "dense_weight", None), torch.ScriptObject):
            found[id(module)] = torch.ops.quantized.linear_unpack(module.dense_weight)[0]
    return list(found.values())


@torch.no_grad()
def load_seconds(models: dict[str, nn.Module], repetitions: int) -> dict[str, float]:
    """Return the seconds to load and optimize each variant that ``from_pretrained`` loads."""
    ways: dict[str, tuple[str, Callable | None]] = {
        BASE: (BASE, None),
        "packed": ("packed", None),
        "torch dynamic int8": (BASE, torch_int8),
        **{
            f'optimized, "{form}"': ("packed", partial(optimize_for_inference, form=form))
            for form in FORMS
        },
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        for name in (BASE, "packed"):
            models[name].save_pretrained(os.path.join(folder, name))
        for _ in range(repetitions):
            for name, (saved, then) in ways.items():
                start = time.perf_counter()
                model = type(models[saved]).from_pretrained(os.path.join(folder, saved)).eval()
                if then is not None:
                    then(model)
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def run_all(args: argparse.Namespace) -> None:
    """Measure every case that is not in the results file yet."""
    done = [line["key"] for line in read_lines(args.results)]
    for threads in args.threads:
        torch.set_num_threads(threads)
        for label, make in cases(args.case).items():
            key = {"case": label, "threads": threads, "clock": args.clock,
                   "repetitions": args.repetitions, "seed": args.seed}  # fmt: skip
            if key in done:
                continue
            torch.manual_seed(args.seed)
            subject = make()
            models = variants(subject, args.seed)
            figures = {"variants": measure(subject, models, args.repetitions, CLOCKS[args.clock])}
            if "1x" in label:
                figures["load"] = load_seconds(models, min(args.repetitions, 5))
            append_line(args.results, key, figures)
            print(f"{label}, {threads} threads: done", flush=True)


def table(lines: list[dict]) -> str:
    """Return the results as Markdown tables: speed by case, then memory, load time and speed.

    Raises:
        ValueError: if there are none.
    """
    if not lines:
        raise ValueError("--results has no finished case; run the benchmark without --table first")
    names = list(lines[0]["variants"])
    text = []
    for threads in sorted({line["key"]["threads"] for line in lines}):
        rows = [line for line in lines if line["key"]["threads"] == threads]
        text += [f"Speed relative to dense float32, {threads} thread{'s' * (threads > 1)}:", ""]
        text += [
            f"| case | {BASE}, ms | {' | '.join(names[1:])} |",
            "|---" * (len(names) + 1) + "|",
        ]
        for line in rows:
            found = line["variants"]
            cells = [f"{found[name]['speed']:.2f}" if name in found else "-" for name in names[1:]]
            text.append(
                f"| {line['key']['case']} | {found[BASE]['ms']:.3g} | {' | '.join(cells)} |"
            )
        text.append("")
    loaded = next((line for line in lines if "load" in line), None)
    if loaded:
        text += [f"Memory, load time and speed of {loaded['key']['case']}:", ""]
        text += ["| variant | memory, MB | load, s | speed |", "|---|---|---|---|"]
        for name, found in loaded["variants"].items():
            load = f"{loaded['load'][name]:.2f}" if name in loaded["load"] else "-"
            text.append(f"| {name} | {found['bytes'] / 1e6:.1f} | {load} | {found['speed']:.2f} |")
        text.append("")
    return "\n".join([*text, *provenance(lines)])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choices = ["linear", "minilm", "gpt2", "tiny"]
    parser.add_argument("--case", nargs="+", choices=choices, default=choices[:3])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repetitions", type=int, default=15, help="rounds over all variants")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: for a busy machine")
    parser.add_argument("--seed", type=int, default=0)
    add_table_arguments(parser, RESULTS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Entry point; ``argv`` defaults to the command line."""
    args = parse(argv)
    if not args.table:
        run_all(args)
    show(args, "speed", table(read_lines(args.results)))


if __name__ == "__main__":
    main()
