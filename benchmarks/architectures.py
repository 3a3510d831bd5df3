"""Generate docs/reference/architectures.md: which layers of the zoo are quantized and noised.

    python benchmarks/architectures.py     # overwrites the page

It also writes the table of docs/how_to/export.md, which architectures export to ONNX. A test fails
if a page is not up to date.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from dataclasses import dataclass

from pages import fill
from transformers import HfArgumentParser
from transformers.utils import logging

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
sys.path.insert(0, os.path.join(ROOT, "tests"))

from support.onnx_exports import NEED_INPUTS, NOT_EXPORTED  # noqa: E402
from support.zoo import ZOO, Architecture, ipq_config  # noqa: E402

from hf_quantnoise import QuantNoiseConfig, apply_quant_noise  # noqa: E402
from hf_quantnoise.modeling.plan import make_plan  # noqa: E402
from hf_quantnoise.noise import find_state  # noqa: E402

HEAD = """# Architectures

This page lists, for each tested architecture, which layers are quantized, which are skipped, and
why. `python benchmarks/architectures.py` generates it from the tiny random models in
`tests/support/zoo.py`, which have two layers where they have layers. `tests/test_zoo.py` runs
each of them from end to end: a training step with noise, bit-equal output without noise, product
quantization and int4, a file of the reported size, bit-equal output after loading, and the same
file when saved again.

- *Quantized*: number of layers per structure group under `IPQConfig(block_size=4, n_centroids=8)`
  with every group except `head` as a stage. A weight that several layers hold counts once.
- *Not quantized*: `quantization_config.left_dense`.
- *No noise*: layers that training noise (proxy, blocks of 4) skips in addition.

A star replaces an index. Some reasons are due to the tiny models (too few blocks, columns that 4
does not divide); real models have fewer of them.

Fused experts (one parameter of shape experts x outputs x inputs) are not quantized yet. They are
most of the weights of a mixture-of-experts model, so compressing one gains little so far.

| architecture | class | quantized | not quantized | no noise |
|---|---|---|---|---|
"""
NOISE = QuantNoiseConfig(noise="proxy", p=0.3, block_size=4)


@dataclass
class PageArguments:
    """Where to write the pages."""

    output: str = os.path.join(ROOT, "docs", "reference", "architectures.md")
    export_page: str = os.path.join(ROOT, "docs", "how_to", "export.md")


def page() -> str:
    """Return the page as Markdown."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the page lists skipped layers
    try:
        rows = [_row(name, kind) for name, kind in ZOO.items()]
    finally:
        logging.set_verbosity(verbosity)
    return HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def onnx_table() -> str:
    """Return which architectures export to ONNX, which ``tests/export/test_onnx_zoo.py`` tests."""
    text = ["| architecture | class | exports |", "|---|---|---|"]
    for name, kind in ZOO.items():
        model = kind.make()
        exports = "yes, with a key and value cache" if model.can_generate() else "yes"
        if name in NEED_INPUTS:
            exports = "yes, with example inputs"
        if name in NOT_EXPORTED:
            is_pair = model.config.is_encoder_decoder
            exports = (
                f"no: {'an encoder and a decoder' if is_pair else 'it keeps no keys and values'}"
            )
        text.append(f"| {name} | `{type(model).__name__}` | {exports} |")
    return "\n".join(text)


def _row(name: str, kind: Architecture) -> tuple[str, ...]:
    model = kind.make()
    stages, _, left_dense = make_plan(model, ipq_config(model))
    groups = Counter(weight.layers[0].group for stage in stages.values() for weight in stage)
    state = find_state(apply_quant_noise(model.train(), NOISE))
    model(**kind.batch())
    state.note_unreached()
    # Reasons that are the same for quantization are in the previous column.
    no_noise = {name: why for name, why in state.left_clean.items() if left_dense.get(name) != why}
    quantized = ", ".join(f"{group} {count}" for group, count in sorted(groups.items()))
    return name, f"`{type(model).__name__}`", quantized, _listed(left_dense), _listed(no_noise)


def _listed(skipped: dict[str, str]) -> str:
    """Return the names of skipped layers grouped by reason, for a cell of the table."""
    names: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        reason = re.split(r": | \(", reason)[0]
        names.setdefault(reason, []).append(f"`{re.sub(r'[.][0-9]+(?=[.])', '.*', name)}`")
    return "<br>".join(
        f"{', '.join(dict.fromkeys(layers))}: {reason}" for reason, layers in names.items()
    )


def main(argv: list[str] | None = None) -> None:
    """Entry point; ``argv`` defaults to the command line."""
    (args,) = HfArgumentParser(PageArguments).parse_args_into_dataclasses(args=argv)
    with open(args.output, "w", encoding="utf-8") as file:
        file.write(page())
    with open(args.export_page, encoding="utf-8") as file:
        text = fill(file.read(), {"onnx_architectures": onnx_table()})
    with open(args.export_page, "w", encoding="utf-8") as file:
        file.write(text)


if __name__ == "__main__":
    main()
