"""The configs of a compressed model as flags of a command line, and how their words are read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal

from .storage import QUANT_METHOD, FixedPointConfig, IPQConfig, QuantizedModelConfig


def parse_int_or_dict(flag: str, text: str) -> int | dict[str, int]:
    """``8``, ``{"ffn": 8, "attention": 4}`` or ``ffn=8,attention=4`` -> an int or a dict.

    Raises:
        ValueError: naming the flag and the three forms.
    """
    text = str(text).strip()
    try:
        if "=" in text and not text.startswith("{"):
            pairs = (part.rsplit("=", 1) for part in text.split(","))
            return {key.strip(): int(size) for key, size in pairs}
        value = json.loads(text)
    except ValueError:
        value = None
    if isinstance(value, int | dict) and not isinstance(value, bool):
        return value
    raise ValueError(
        f"--{flag} {text!r} is no size; give an integer (8), pairs "
        '(ffn=8,embeddings=8,attention=4) or JSON (\'{"ffn": 8, "attention": 4}\')'
    )


def parse_share_layers(text: str) -> int | list[list[str]]:
    """``2``, or JSON: the names of the layers of each chunk.

    Raises:
        ValueError: naming the flag and the two forms.
    """
    try:
        return json.loads(text)
    except ValueError:
        raise ValueError(
            f"--share_layers {text!r} is no number of layers; give an integer (2), or JSON with "
            'the names of the layers of each chunk (\'[["blocks.1", "blocks.2"]]\')'
        ) from None


def parse_patterns(text: str | None) -> str | list[str] | None:
    """A regex for whole layer names, or a JSON list of exact names and suffixes."""
    try:
        value = json.loads(text) if text else None
    except ValueError:
        return text
    return value if isinstance(value, list) else text


def _read_json(flag: str, file_name: str) -> tuple[dict, dict]:
    """A JSON file, and the quantization config in it: its own, or a ``config.json``'s.

    Raises:
        ValueError: naming the flag, if the file cannot be read.
    """
    try:
        with open(file_name, encoding="utf-8") as file:
            values = json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"--{flag} {file_name!r} is no JSON file: {error}") from None
    whole = values if isinstance(values, dict) else {}
    own = whole if "quant_method" in whole else {}
    return values, whole.get("quantization_config") or own


def read_layer_quantizers(file_name: str) -> dict[str, dict]:
    """How single layers are stored: JSON from layer name to settings, a quantization config, or
    the config.json of a compressed model, whose allotment it is then.

    Raises:
        ValueError: naming the flag, if the file cannot be read or says nothing of layers.
    """
    values, config = _read_json("layer_quantizers", file_name)
    found = config.get("layer_quantizers") or config.get("plan")
    if config and not found:
        raise ValueError(
            f"--layer_quantizers {file_name!r} is a quantization config that names no layers; take "
            "--config to have all its settings"
        )
    return found or values


def read_quantization_config(file_name: str) -> QuantizedModelConfig:
    """The settings of a quantization config, or of a compressed model's config.json, without what
    compression filled in.

    Raises:
        ValueError: naming the flag, if the file cannot be read or is something else; or as the
            config does.
    """
    _, config = _read_json("config", file_name)
    if config.get("quant_method") != QUANT_METHOD:
        raise ValueError(
            f"--config {file_name!r} is no quantization config of {QUANT_METHOD}; "
            "`hf-quantnoise plan MODEL --save FILE` writes one"
        )
    filled_in = ("plan", "left_dense", "shared_layers", "pruned_layers")
    return QuantizedModelConfig.from_dict(
        {name: value for name, value in config.items() if name not in filled_in}
    )


# Scheme -> flags that no other scheme reads. Noise reads --block_size, --n_centroids and --observer
# whatever the scheme is.
ONLY = {
    "ipq": (
        "stages", "codebook_bits", "kmeans_iter", "importance", "row_scale", "n_codebooks",
        "target_size_mb", "target_bits_per_weight", "layer_quantizers",
    ),
    "fixed_point": ("bits",),
}  # fmt: skip


def _default(of: Field) -> Any:
    return of.default if of.default_factory is MISSING else of.default_factory()


@dataclass
class QuantizationFlags:
    """What a small model is to be: :class:`IPQConfig` or :class:`FixedPointConfig` in flags, for
    ``HfArgumentParser``."""

    scheme: Literal["ipq", "fixed_point"] = field(
        default="ipq", metadata={"help": "Product quantization in stages, or intN."}
    )
    block_size: str = field(
        default="4",
        metadata={"help": "Numbers per block: 8, or ffn=8,embeddings=8,attention=4, or JSON."},
    )
    n_centroids: str = field(
        default="256", metadata={"help": "Centroids per codebook, in the form of --block_size."}
    )
    stages: list[str] = field(
        default_factory=lambda: ["ffn", "embeddings", "attention"],
        metadata={"help": "Structure groups (or regexes) in the order of quantization."},
    )
    codebook_bits: int = field(
        default=32, metadata={"help": "Bits of a stored centroid: 32, 16, 8."}
    )
    kmeans_iter: int = field(default=20, metadata={"help": "Most iterations of k-means."})
    importance: Literal["none", "activations"] = field(
        default="none", metadata={"help": "Weigh errors by what the inputs are on training data."}
    )
    row_scale: bool = field(default=False, metadata={"help": "A scale for each row of a weight."})
    n_codebooks: int = field(
        default=1, metadata={"help": "2: a block is the sum of two centroids; double --block_size."}
    )
    target_size_mb: float | None = field(
        default=None,
        metadata={"help": "MB the file may have; blocks and centroids are then allotted by layer."},
    )
    target_bits_per_weight: float | None = field(
        default=None, metadata={"help": "The same in bits for each parameter."}
    )
    layer_quantizers: str | None = field(
        default=None,
        metadata={"help": "JSON file: how single layers are stored, or another run's config.json."},
    )
    bits: int | None = field(
        default=None,
        metadata={"help": "Bits of a weight, of --scheme fixed_point alone; default: 8."},
    )
    observer: str = field(
        default="minmax", metadata={"help": "Range of intN: minmax, channel or histogram."}
    )
    activation_bits: int | None = field(
        default=None,
        metadata={"help": "Bits of what enters a quantized layer; noise rounds it likewise."},
    )
    share_layers: str = field(
        default="1",
        metadata={
            "help": "Layers per chunk of shared weights, in training (with noise) and on disk."
        },
    )
    prune_layers: str | None = field(
        default=None,
        metadata={"help": "Layers taken out first: every_other, a regex, or a JSON list of names."},
    )
    target_modules: str | None = field(
        default=None, metadata={"help": "Layers to quantize: a regex, or a JSON list of suffixes."}
    )
    exclude_modules: str | None = field(
        default=None, metadata={"help": "Layers to leave dense; same form."}
    )

    def given(self) -> list[str]:
        """The flags whose values are not the defaults."""
        return [f.name for f in fields(QuantizationFlags) if getattr(self, f.name) != _default(f)]

    def refuse_of_other_scheme(self, more: Mapping[str, Sequence[str]] = {}) -> None:
        """Refuses flags that say nothing of the scheme asked for.

        Args:
            more: scheme -> its flags that another scheme does not read either, here.

        Raises:
            ValueError: naming the flag, its value and the scheme that reads it.
        """
        for scheme, own in ONLY.items():
            wrong = {*own, *more.get(scheme, ())}.intersection(self.given())
            if scheme != self.scheme and wrong:
                name = min(wrong)
                raise ValueError(
                    f"--{name} is of --scheme {scheme}, and here are --scheme {self.scheme} and "
                    f"--{name} {getattr(self, name)}; take one of them out"
                )

    def config(self, seed: int) -> IPQConfig | FixedPointConfig:
        """The package's config of the small model.

        Raises:
            ValueError: if a flag is of another scheme, or its value is none.
        """
        self.refuse_of_other_scheme()
        shared = {
            "target_modules": parse_patterns(self.target_modules),
            "exclude_modules": parse_patterns(self.exclude_modules),
            "activation_bits": self.activation_bits,
            "share_layers": parse_share_layers(self.share_layers),
            "prune_layers": parse_patterns(self.prune_layers),
            "seed": seed,
        }
        if self.scheme == "fixed_point":
            bits = 8 if self.bits is None else self.bits
            return FixedPointConfig(bits=bits, observer=self.observer, **shared)
        layers = self.layer_quantizers
        return IPQConfig(
            block_size=parse_int_or_dict("block_size", self.block_size),
            n_centroids=parse_int_or_dict("n_centroids", self.n_centroids),
            stages=self.stages,
            codebook_bits=self.codebook_bits,
            kmeans_iter=self.kmeans_iter,
            importance=self.importance,
            row_scale=self.row_scale,
            n_codebooks=self.n_codebooks,
            target_size_mb=self.target_size_mb,
            target_bits_per_weight=self.target_bits_per_weight,
            layer_quantizers={} if layers is None else read_layer_quantizers(layers),
            **shared,
        )
