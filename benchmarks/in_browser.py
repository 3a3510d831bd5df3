#!/usr/bin/env python
"""Compressed MiniLM in a browser: bytes to download, time per sentence, memory, accuracy.

Everything runs in the page of ``examples/browser`` in a headless Chromium, in WebAssembly with one
thread. Variants run in turn, in alternating order; times are medians over the rounds.

    python benchmarks/in_browser.py --data_dir ../shared/data \\
      --model_dir benchmarks/runs/float32/sst2-42-0.0001-2
    python benchmarks/in_browser.py --table --page docs/how_to/browser.md   # write the table there

``--model_dir`` is a float32 model of ``benchmarks/quality/glue_float32.py``. It is compressed in
one shot, without training. Variants that have a row are not measured again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import statistics
import sys
import threading
from pathlib import Path

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "examples"))

import torch
from browser import build
from chromium import Chromium, find_chromium
from datasets import Dataset
from pages import add_table_arguments, show
from results_file import append_line, provenance, read_lines
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_quantnoise import quantize_model
from hf_quantnoise.recipes import recipe

RESULTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results", "browser.jsonl")
TOKENS = (16, 128)
# Words that are one token each; [CLS] and [SEP] are two more.
TEXTS = {tokens: " ".join(["film"] * (tokens - 2)) for tokens in TOKENS}
MEGABITS = 10  # per second, of the connection of the last column
# Keeps the memory of WebAssembly, whose size the page cannot ask for, and which all models of a
# page share. So the page must not start its first model, which it does by a click.
KEEP_MEMORY = """
HTMLElement.prototype.click = () => {};
const Memory = WebAssembly.Memory;
WebAssembly.Memory = function (sizes) {
  const memory = new Memory(sizes);
  if (sizes.initial) self.wasmMemory = memory;
  return memory;
};
WebAssembly.Memory.prototype = Memory.prototype;
"""


def add_variants(site: Path, args: argparse.Namespace) -> dict[str, str]:
    """Write the models that are not there yet; return their folders by name."""
    variants = {"float32": "float32", "float32, int8 of onnxruntime": "onnxruntime-int8"}
    for size in args.sizes:
        variants |= {f"{size}, one shot": size, f"{size}, one shot, int8": f"{size}-int8"}
    for name, folder in variants.items():
        path = site / "text" / folder
        if not path.is_dir():
            print(f"{name}: exporting", flush=True)
            part = path.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            add_variant(site, folder, part, args)
            part.rename(path)
    return {name: f"text/{folder}" for name, folder in variants.items()}


def add_variant(site: Path, name: str, folder: Path, args: argparse.Namespace) -> None:
    """Write one model in the layout of transformers.js."""
    size, _, form = name.partition("-")
    if size == "float32":
        model = AutoModelForSequenceClassification.from_pretrained(args.model_dir).float().eval()
        build.add_model(model, "text", args.model_dir, folder)
    elif size == "onnxruntime":
        import onnx
        from onnxruntime.quantization import quantize_dynamic

        shutil.copytree(site / "text" / "float32", folder)
        path = folder / "onnx" / "model.onnx"
        graph = onnx.load(path)
        del graph.graph.value_info[:]  # shapes of torch's exporter, which the quantizer rejects
        quantize_dynamic(graph, path)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(packed_folder(size, args)).eval()
        build.add_model(model, "text", args.model_dir, folder, form or "fp32")


def packed_folder(size: str, args: argparse.Namespace) -> Path:
    """Return the folder of a compressed model, which is written if it is not there yet."""
    folder = Path(args.work_dir) / size
    if not (folder / "config.json").is_file():
        model = AutoModelForSequenceClassification.from_pretrained(args.model_dir).float().eval()
        config = recipe(size, model).quantization
        words = training_batches(args) if config.counts_lookups else None
        model = quantize_model(model, config, calibration_data=words, progress=False)
        model.save_pretrained(folder)
    return folder


def training_batches(args: argparse.Namespace) -> list[dict[str, torch.Tensor]]:
    """Return batches of training sentences, whose words are counted."""
    data = Dataset.from_parquet(os.path.join(args.data_dir, "sst2", "train.parquet"))
    tokenizer = AutoTokenizer.from_pretrained(args.model_dir)
    batches = data.shuffle(seed=0).select(range(9600)).iter(32)
    return [dict(tokenizer(b["sentence"], padding=True, return_tensors="pt")) for b in batches]


def downloads(site: Path, folder: str) -> dict[str, dict[str, int]]:
    """Return the bytes of model, tokenizer and runtime, as files and compressed with gzip."""
    parts: dict[str, list[Path]] = {
        "model": [*(site / folder / "onnx").iterdir()],
        "tokenizer": [path for path in (site / folder).iterdir() if path.is_file()],
        "runtime": [*(site / "runtime").iterdir()],
    }
    return {
        name: {
            "bytes": sum(path.stat().st_size for path in paths),
            "gzip": sum(len(gzip.compress(path.read_bytes(), mtime=0)) for path in paths),
        }
        for name, paths in parts.items()
    }


def script(folder: str, body: str) -> str:
    """Return JavaScript that runs ``body`` with the pipeline of a model as ``classify``."""
    model = json.dumps({"folder": folder})
    return f"""(async () => {{
      const page = await import("./page.js");
      const classify = await page.load("text-classification", {model});
      {body}
    }})()"""


def measure_alone(browser: Chromium, url: str, folder: str) -> dict[str, float]:
    """Return the seconds to load a model and to answer once, and the memory after a long text."""
    browser.open(f"{url}?{folder}")
    browser.wait_for("!!document.querySelector('[role=tab]')")
    started = script(folder, f"await classify({TEXTS[16]!r}); return performance.now() - begun;")
    seconds = browser.evaluate(f"(begun = performance.now(), {started})") / 1000
    browser.evaluate(script(folder, f"await classify({TEXTS[max(TOKENS)]!r});"))
    return {"start_s": seconds, "wasm_bytes": browser.evaluate("wasmMemory.buffer.byteLength")}


def measure_times(
    browser: Chromium, folders: dict[str, str], repetitions: int
) -> dict[str, dict[int, float]]:
    """Return the median milliseconds per sentence, tokenization included, by variant and tokens."""
    times: dict[str, dict[int, list[float]]] = {name: {n: [] for n in TOKENS} for name in folders}
    for repetition in range(repetitions + 1):
        for name in list(folders) if repetition % 2 else reversed(list(folders)):
            for tokens, text in TEXTS.items():
                run = f"await classify({text!r});"
                timed = f"const t = performance.now(); {run} return performance.now() - t;"
                milliseconds = browser.evaluate(script(folders[name], f"{run} {timed}"), 600)
                if repetition:  # the first round loads and prepares the models
                    times[name][tokens].append(milliseconds)
    return {
        name: {tokens: statistics.median(found) for tokens, found in of_name.items()}
        for name, of_name in times.items()
    }


def measure_answers(browser: Chromium, folder: str, data: Dataset) -> list[int]:
    """Return the predicted class of each sentence."""
    answers: list[int] = []
    for start in range(0, len(data), 50):
        sentences = json.dumps(data[start : start + 50]["sentence"])
        answers += browser.evaluate(
            script(folder, f"""const found = [];
              for (const sentence of {sentences}) {{
                const {{ logits }} = await classify.model(classify.tokenizer(sentence));
                found.push(Number(logits.data[1] > logits.data[0]));
              }}
              return found;"""),
            600,
        )  # fmt: skip
    return answers


def run_all(args: argparse.Namespace) -> None:
    """Measure the variants, if one has no row."""
    site = Path(args.work_dir) / "site"
    if not site.is_dir():
        build.write_page(site)
    folders = add_variants(site, args)
    keys = {name: {"variant": name, "repetitions": args.repetitions} for name in folders}
    done = [line["key"] for line in read_lines(args.results)]
    if all(key in done for key in keys.values()):
        return
    models = [build.entry(site, name, folder) for name, folder in folders.items()]
    build.write_manifest(site, {"text": build.entry_of_tab(build.TABS["text"], models)})
    data = Dataset.from_parquet(os.path.join(args.data_dir, "sst2", "dev.parquet"))
    data = data.select(range(min(args.max_samples or len(data), len(data))))
    with build.make_server(site) as server, Chromium(find_chromium()) as browser:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/"
        browser.send("Page.addScriptToEvaluateOnNewDocument", source=KEEP_MEMORY)
        figures = {name: measure_alone(browser, url, folders[name]) for name in folders}
        answers = {name: measure_answers(browser, folders[name], data) for name in folders}
        times = measure_times(browser, folders, args.repetitions)
        version = browser.send("Browser.getVersion")["product"]
        server.shutdown()
    for name, key in keys.items():
        same = [a == b for a, b in zip(answers[name], answers["float32"], strict=True)]
        correct = [a == b for a, b in zip(answers[name], data["label"], strict=True)]
        row = figures[name] | {
            "ms": times[name], "accuracy": sum(correct) / len(data),
            "agreement": sum(same) / len(data), "browser": version,
            "download": downloads(site, folders[name]),
        }  # fmt: skip
        if key not in done:
            append_line(args.results, key, row)


def table(lines: list[dict]) -> str:
    """Return the rows as a Markdown table.

    Raises:
        ValueError: if there are none.
    """
    if not lines:
        raise ValueError("--results has no row; run the benchmark without --table first")
    head = (
        "model", "ONNX file, MB", "with gzip", "tokenizer and config, with gzip",
        "first visit, with gzip", f"at {MEGABITS} Mbit/s", *(f"{n} tokens, ms" for n in TOKENS),
        "WebAssembly memory, MB", "accuracy", "same answer as float32",
    )  # fmt: skip
    text = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for line in lines:
        found = line["download"]
        visit = sum(part["gzip"] for part in found.values())
        cells = [
            line["key"]["variant"], f"{found['model']['bytes'] / 1e6:.2f}",
            *(f"{found[part]['gzip'] / 1e6:.2f}" for part in ("model", "tokenizer")),
            f"{visit / 1e6:.1f}", f"{visit * 8 / 1e6 / MEGABITS:.0f} s",
            *(f"{line['ms'][str(tokens)]:.1f}" for tokens in TOKENS),
            f"{line['wasm_bytes'] / 1e6:.0f}", f"{100 * line['accuracy']:.1f}",
            f"{100 * line['agreement']:.1f} %",
        ]  # fmt: skip
        text.append(f"| {' | '.join(cells)} |")
    runtime = lines[0]["download"]["runtime"]
    text += [
        "",
        f"The runtime, once for all models, takes {runtime['bytes'] / 1e6:.1f} MB "
        f"({runtime['gzip'] / 1e6:.1f} MB with gzip). Browser: {lines[0]['browser']}.",
        "",
    ]
    return "\n".join([*text, *provenance(lines)])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_dir", help="float32 model")
    parser.add_argument("--data_dir", help="folder with sst2/dev.parquet")
    parser.add_argument("--sizes", nargs="+", default=["13x", "20x"], help="recipes")
    parser.add_argument("--repetitions", type=int, default=15, help="rounds over all variants")
    parser.add_argument("--max_samples", type=int, help="dev sentences; default: all")
    parser.add_argument("--work_dir", default="benchmarks/runs/browser", help="exported models")
    add_table_arguments(parser, RESULTS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Entry point; ``argv`` defaults to the command line."""
    args = parse(argv)
    if not args.table:
        run_all(args)
    show(args, "browser", table(read_lines(args.results)))


if __name__ == "__main__":
    main()
