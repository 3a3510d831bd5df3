#!/usr/bin/env python
"""Put together a static page that runs compressed models in the browser, and serve it.

    make web                                                     # small models from the Hub
    make web ARGS="--text out/dense --image ''"                  # one model of your own
    make web ARGS="--text out/compressed --text_float32 out/dense"

Models are folders or names on the Hub. A model that is not compressed is compressed in one shot
and shown next to its float32 form: a text classifier by product quantization, an image
classifier as int8. The page is a folder of static files that any web server can serve.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.cbook
import torch
from page_server import open_server
from sklearn.datasets import load_sample_images
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.utils import cached_file

from hf_quantnoise import FixedPointConfig, IPQConfig, export_onnx, quantize_model
from hf_quantnoise.export.onnx_inputs import dynamic_axes, example_inputs
from hf_quantnoise.hub.model_classes import load_complete
from hf_quantnoise.modeling import packed_layers
from hf_quantnoise.runs.loading import errors_name_model
from hf_quantnoise.runs.tokenizers import load_tokenizer, position_limit

HERE = Path(__file__).resolve().parent
PACKAGES = HERE / "node_modules"
PAGE = ("index.html", "page.js", "style.css")
CODE = (
    "@huggingface/transformers/dist/transformers.web.min.js",
    "onnxruntime-web/dist/ort.wasm.bundle.min.mjs",
)
WASM = "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm"


@dataclass(frozen=True)
class Tab:
    """A tab of the page.

    Attributes:
        title: its name on the page.
        task: the pipeline of transformers.js.
        auto_class: loads its models.
        default: a small public model.
        storage: how a model that is not compressed is stored, given the arguments.
        settings: further entries of models.json.
    """

    title: str
    task: str
    auto_class: Any
    default: str
    storage: Callable[[argparse.Namespace], Any]
    settings: dict[str, Any]


TABS = {
    "text": Tab(
        "Text", "text-classification", AutoModelForSequenceClassification,
        "philschmid/MiniLM-L6-H384-uncased-sst2",
        lambda args: IPQConfig(
            block_size=dict.fromkeys(("ffn", "attention", "embeddings"), args.block_size)
        ),
        {"example": "A warm, witty film with a cast that never puts a foot wrong.", "top": 3},
    ),
    "image": Tab(
        "Picture", "image-classification", AutoModelForImageClassification,
        "google/mobilenet_v1_0.75_192",
        # MobileNet loses its accuracy if it is product-quantized without any training.
        lambda args: FixedPointConfig(bits=8, observer="channel"),
        {"top": 5},
    ),
}  # fmt: skip


def build(args: argparse.Namespace) -> None:
    """Write the page to ``args.output``, which is replaced.

    Raises:
        FileNotFoundError: if the npm packages are not installed.
        ValueError: if the folder must not be replaced, or a model cannot be shown.
    """
    output = Path(args.output)
    check_output(output, args)
    write_page(output)
    tabs = {}
    for name, tab in TABS.items():
        if getattr(args, name):
            models = [entry(output, *model) for model in add_models(output, name, args).items()]
            extra = {"samples": add_samples(output)} if name == "image" else {}
            tabs[name] = entry_of_tab(tab, models) | extra
    write_manifest(output, tabs)


def check_output(output: Path, args: argparse.Namespace) -> None:
    """Raise a ``ValueError`` if a folder has other files than a page, or one of the models."""
    names = sorted(os.listdir(output)) if output.is_dir() else []
    if names and not {"page.js", "runtime"} <= {*names}:
        raise ValueError(
            f"--output {str(output)!r} has other files than a page ({', '.join(names[:3])}), which "
            "would be deleted; choose another folder"
        )
    for flag in (f"{name}{form}" for name in TABS for form in ("", "_float32")):
        model = getattr(args, flag)
        is_inside = bool(model) and Path(model).resolve().is_relative_to(output.resolve())
        if is_inside and Path(model).is_dir():
            raise ValueError(
                f"--output {str(output)!r} contains the model of --{flag}, which would be deleted; "
                "choose another folder"
            )


def write_page(output: Path) -> None:
    """Replace a folder by the page, without models."""
    missing = [name for name in (*CODE, WASM) if not (PACKAGES / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"the page needs npm packages, and {PACKAGES / missing[0]} does not exist; install "
            f"Node.js, which has npm, and run: npm ci --ignore-scripts --prefix {HERE}"
        )
    shutil.rmtree(output, ignore_errors=True)
    (output / "runtime").mkdir(parents=True)
    for name in PAGE:
        shutil.copyfile(HERE / name, output / name)
    for name in (*CODE, WASM):
        shutil.copyfile(PACKAGES / name, output / "runtime" / Path(name).name)


def write_manifest(output: Path, tabs: dict[str, dict]) -> None:
    """Write models.json, the list of what the page shows."""
    files = sizes(output, "runtime")
    wasm = {path: size for path, size in files.items() if path.endswith(".wasm")}
    code = {path: size for path, size in files.items() if path not in wasm}
    manifest = {"runtime": {"code": code, "wasm": wasm}, "tabs": tabs}
    (output / "models.json").write_text(json.dumps(manifest, indent=1), "utf-8")


def entry_of_tab(tab: Tab, models: list[dict]) -> dict:
    """Return the entry of a tab in models.json."""
    return {"title": tab.title, "task": tab.task, **tab.settings, "models": models}


def entry(output: Path, title: str, folder: str) -> dict:
    """Return the entry of a model in models.json."""
    return {"name": title, "folder": folder, "files": sizes(output, folder)}


def sizes(output: Path, folder: str) -> dict[str, int]:
    """Return the sizes in bytes of the files below a folder, by path."""
    files = [path for path in sorted((output / folder).rglob("*")) if path.is_file()]
    return {path.relative_to(output).as_posix(): path.stat().st_size for path in files}


def add_models(output: Path, name: str, args: argparse.Namespace) -> dict[str, str]:
    """Write the compressed model of a tab, and its float32 form; return their folders by title."""
    tab, source = TABS[name], getattr(args, name)
    dense_source = getattr(args, f"{name}_float32")
    labels = getattr(args, f"{name}_labels")
    model = load(name, tab, source)
    if labels and len(labels) != model.config.num_labels:
        raise ValueError(
            f"--{name}_labels has {len(labels)} names, and the model {source!r} has "
            f"{model.config.num_labels} classes; pass a name for each class"
        )
    if not any(packed_layers(model)):
        dense_source = dense_source or source
        print(f"{source}: compressing in one shot", flush=True)
        model = quantize_model(model, tab.storage(args), progress=False)
    found = {"Compressed": (model, source)}
    if dense_source:
        flag = f"{name}_float32"
        dense = load(flag, tab, dense_source, dtype=torch.float32)
        if any(packed_layers(dense)):
            raise ValueError(f"invalid --{flag} {dense_source!r}: it is compressed already")
        found["float32"] = dense, dense_source
    for title, (model, place) in found.items():
        if labels:
            model.config.id2label = dict(enumerate(labels))
        add_model(model, name, place, output / name / title.lower(), args.dtype)
    return {title: f"{name}/{title.lower()}" for title in found}


def load(flag: str, tab: Tab, source: str, **kwargs: Any) -> PreTrainedModel:
    """Load the classifier that a flag names.

    Raises:
        ValueError: with the flag, if it is missing or not a classifier.
    """
    with errors_name_model(f"invalid --{flag}", source):
        model = load_complete(tab.auto_class, source, **kwargs).eval()
    if model.config.num_labels < 2:
        raise ValueError(f"invalid --{flag} {source!r}: it has one output, expected a classifier")
    return model


def add_model(
    model: PreTrainedModel, name: str, source: str, folder: Path, dtype: str = "fp32"
) -> None:
    """Write a model as transformers.js reads it: config, tokenizer or processor, ONNX file."""
    if any(packed_layers(model)):
        # int8 products are those of Linear layers, of which image classifiers may have none.
        export_onnx(model, folder, dtype=dtype if name == "text" else "fp32")
    else:
        export_float32(model, folder)
    if name == "text":  # in the form of a fast tokenizer, which the source may lack
        tokenizer = load_tokenizer(name, source)
        if (limit := position_limit(model)) is not None:  # transformers.js truncates to this length
            tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
        tokenizer.save_pretrained(folder)
    else:
        shutil.copy(cached_file(source, "preprocessor_config.json"), folder)


def export_float32(model: PreTrainedModel, folder: Path) -> None:
    """Write a model that is not compressed in the same layout."""
    inputs = example_inputs(model)
    (folder / "onnx").mkdir(parents=True)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # notes on packages it does not need
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about internals of the exporter
        program = torch.onnx.export(
            model, kwargs=inputs, dynamo=True, verbose=False, dynamic_shapes=dynamic_axes(inputs),
            output_names=["logits"],
        )  # fmt: skip
    program.save(folder / "onnx" / "model.onnx")
    setattr(model.config, "transformers.js_config", {"dtype": "fp32"})
    model.config.save_pretrained(folder)


def add_samples(output: Path) -> list[str]:
    """Copy the sample pictures of scikit-learn and matplotlib; return their paths."""
    portrait = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    (output / "samples").mkdir()
    for file in (*load_sample_images().filenames, portrait):
        shutil.copy(file, output / "samples")
    return sorted(path.relative_to(output).as_posix() for path in (output / "samples").iterdir())


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, tab in TABS.items():
        what = f"model of the tab {tab.title!r}"
        parser.add_argument(f"--{name}", default=tab.default, help=f"{what}; '' for no such tab")
        parser.add_argument(f"--{name}_float32", help=f"its float32 form, if --{name} is packed")
        parser.add_argument(f"--{name}_labels", nargs="+", help="names of its classes")
    parser.add_argument("--block_size", type=int, default=4, help="of text models, in one shot")
    kinds = "float or faster int8 products of the compressed text model"
    parser.add_argument("--dtype", choices=["fp32", "int8"], default="fp32", help=kinds)
    parser.add_argument("--output", default=str(HERE / "site"), help="replaced if it exists")
    parser.add_argument("--serve", type=int, metavar="PORT", help="serve the page on 127.0.0.1")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Entry point; ``argv`` defaults to the command line."""
    args = parse(argv)
    server = None
    try:
        if not any(getattr(args, name) for name in TABS):
            raise ValueError(f"no models: pass {' or '.join(f'--{name}' for name in TABS)}")
        if args.serve is not None:
            server = open_server(args.output, args.serve)
        build(args)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(f"the page is in {args.output}")
    if server is not None:
        with server:
            print(f"open http://127.0.0.1:{server.server_address[1]}/ (Ctrl+C ends it)", flush=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                print()


if __name__ == "__main__":
    main()
