"""Write docs/reference/configuration.md from the options of the configs.

    python docs/write_configuration.py

A test compares the page with the code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from hf_quantnoise import CompressionArguments, FixedPointConfig, IPQConfig, QuantNoiseConfig
from hf_quantnoise.configuration import QuantizedModelConfig
from hf_quantnoise.configuration.options import options_of

HEAD = """# Configuration reference

This page lists every option of every config. `python docs/write_configuration.py` generates it.

All configs are dataclasses. Every value is checked when the config is created; an invalid one
raises a `ValueError` with the field, the value and what was expected. The flags of
`hf-quantnoise` and of the examples are made from the same declarations ([command
line](../how_to/command_line.md)).
"""

SECTIONS = {
    QuantNoiseConfig: """
The noise to train with (section 4). `QuantNoiseConfig.matching(quantization_config)` returns
noise with the blocks of a target. `save_pretrained(folder)` and `push_to_hub(repo_id)` write
`quant_noise_config.json`, `from_pretrained` loads it from a folder or the Hub; `to_dict`,
`from_dict` and `to_json_string` convert it.
""",
    IPQConfig: """
Product quantization (section 3.2): how a model is compressed and stored. It is saved, pushed and
loaded in the same way, as `quantization_config.json`. Keys of `block_size` and `n_centroids` that
are not a structure group and match no layer raise an error.

A layer stays dense, with the reason in `left_dense`, if `block_size` does not divide its columns,
if it has no more blocks than centroids, or if packing would not make it smaller. How blocks and
centroids are allocated for a target size is described in [target size](../how_to/target_size.md).
""",
    FixedPointConfig: """
Fixed-point scalar quantization of the weights (section 3.1, Eq. 2). It also has the options of
`IPQConfig` from `target_modules` on; `seed` is unused, since nothing is random here.
""",
    CompressionArguments: """
Finetuning in the stages of `QuantNoiseTrainer.compress(config, compression_args, teacher)`, for
`HfArgumentParser`. Batch size, optimizer, precision and seed are those of the trainer
([stages](../concepts/compression_run.md)). With `teacher=None` the teacher is a frozen copy of the
uncompressed model; any model with the same head can be used
([distillation](../concepts/distillation.md)).
""",
}


def as_code(text: str, names: Iterable[str]) -> str:
    """Return a help text as Markdown: quoted values and names of options become code."""
    known = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    # JSON, a quoted value, or a name.
    pattern = rf"(\{{[^{{}}]*(?:\{{[^{{}}]*\}}[^{{}}]*)*\}})|(?<!\w)('[^']+')(?!\w)|\b({known})\b"
    return re.sub(pattern, lambda match: f"`{match[0]}`".replace("'", '"'), text)


def _default(value: object) -> str:
    return repr(value) if value is None or isinstance(value, bool) else json.dumps(value)


def page() -> str:
    """Return the page in Markdown."""
    parts = [HEAD]
    for config, text in SECTIONS.items():
        parts.append(
            f"\n## {config.__name__}\n{text}\n| field | default | meaning |\n|---|---|---|\n"
        )
        options, shared = options_of(config), options_of(QuantizedModelConfig)
        names = [name for name in options if "_" in name]
        if config is FixedPointConfig:  # listed for IPQConfig
            options = {name: options[name] for name in options if name not in shared}
        elif issubclass(config, QuantizedModelConfig):  # own fields first
            options = {name: options[name] for name in sorted(options, key=shared.__contains__)}
        parts += [
            f"| `{name}` | `{_default(declared.default)}` | {as_code(declared.help, names)} |\n"
            for name, declared in options.items()
        ]
    return "".join(parts)


if __name__ == "__main__":
    (Path(__file__).parent / "reference" / "configuration.md").write_text(page(), "utf-8")
