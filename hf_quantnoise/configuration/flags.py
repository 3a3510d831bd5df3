"""Command-line flags of the configs, made from their options."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, make_dataclass
from typing import Any, Literal, TypeVar

from ..files.reading import read_json
from ..version import QUANT_METHOD
from .fixed_point import FixedPointConfig
from .ipq import IPQConfig
from .noise import QuantNoiseConfig
from .options import Option, option, options_of
from .storage import RECORDS, SCHEMES, QuantizedModelConfig

Config = TypeVar("Config")


def invalid_flag(flag: str, value: Any, expected: str) -> ValueError:
    """Return the error of a flag with an invalid value, to be raised."""
    return ValueError(f"invalid --{flag} {value!r}: expected {expected}")


def parse_int_or_dict(flag: str, value: Any) -> int | dict[str, int]:
    """Return ``8``, ``{"ffn": 8, "attention": 4}`` or ``ffn=8,attention=4`` as an int or dict."""
    text = value.strip() if isinstance(value, str) else json.dumps(value)
    try:
        if "=" in text and not text.startswith("{"):
            pairs = (part.rsplit("=", 1) for part in text.split(","))
            return {key.strip(): int(size) for key, size in pairs}
        size = json.loads(text)
    except ValueError:
        size = None
    if isinstance(size, int | dict) and not isinstance(size, bool):
        return size
    json_form = '{"ffn": 8, "attention": 4}'
    expected = f"an integer (8), pairs (ffn=8,attention=4) or JSON ('{json_form}')"
    raise invalid_flag(flag, value, expected)


def _parse_json(flag: str, value: Any) -> Any:
    """Return the content of a JSON text; other values, which the config checks, as they are."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def parse_patterns(flag: str, value: Any) -> str | list[str] | None:
    """Return a regex as it is, and a JSON list of names and suffixes as a list."""
    names = _parse_json(flag, value)
    return names if isinstance(names, list) else value or None


def _one_or_list(flag: str, values: Any) -> Any:
    return values[0] if isinstance(values, list) and len(values) == 1 else values


def _read_json(flag: str, file_name: str) -> tuple[dict, dict]:
    """Return the content of a JSON file, and the quantization config that it is or has."""
    try:
        content = read_json(file_name)
    except (OSError, ValueError) as error:
        raise invalid_flag(flag, file_name, f"a JSON file ({error})") from None
    own = content if "quant_method" in content else {}
    return content, content.get("quantization_config") or own


def _read_layer_quantizers(flag: str, value: Any) -> dict[str, dict]:
    """Return the ``layer_quantizers`` of a JSON file of layers or a quantization config."""
    if not isinstance(value, str):
        return value
    content, config = _read_json(flag, value)
    found = config.get("layer_quantizers") or config.get("plan")
    if config and not found:
        raise ValueError(
            f"invalid --{flag} {value!r}: the quantization config has no settings of single "
            "layers; pass --config to use all its settings"
        )
    return found or content


def read_quantization_config(file_name: str) -> QuantizedModelConfig:
    """Return the config in a quantization config's file or a compressed model's ``config.json``.

    The fields that compression filled in are not read.
    """
    _, config = _read_json("config", file_name)
    if config.get("quant_method") != QUANT_METHOD:
        raise ValueError(
            f"invalid --config {file_name!r}: not a quantization config of {QUANT_METHOD}; write "
            "one with `hf-quantnoise plan MODEL --save FILE`"
        )
    settings = {name: value for name, value in config.items() if name not in RECORDS}
    return QuantizedModelConfig.from_dict(settings)


@dataclass(frozen=True)
class Form:
    """How values of a type are written on a command line."""

    type: Any  # of the flag's dataclass field
    # Returns the value for the config, from flag name and argument.
    read: Callable[[str, Any], Any] = lambda flag, value: value
    hint: str = ""  # appended to the help


_CHUNKS = Form(str | None, _parse_json, "Format: 2, or JSON.")
# Type of an option -> its form; other types are written as they are.
FORMS: dict[Any, Form] = {
    int | dict[str, int]: Form(
        str | None, parse_int_or_dict, "Format: 8, or ffn=8,attention=4, or JSON."
    ),
    int | list[list[str]]: _CHUNKS,
    int | list[list[str]] | None: _CHUNKS,
    str | list[str] | None: Form(str | None, parse_patterns, "Format: a regex, or a JSON list."),
    str | int: Form(str, _parse_json),
    str | int | None: Form(str | None, _parse_json, "Format: epoch, or 20."),
    int | float | None: Form(str | None, _parse_json, "Format: 8000, or 0.96."),
    int | float | dict[str, int] | None: Form(str | None, _parse_json),
    str | list[str]: Form(list[str], _one_or_list),
    float | list[float]: Form(list[float], _one_or_list),
    list[str] | tuple[str, ...] | None: Form(list[str] | None),
    dict[str, dict[str, Any]]: Form(
        str | None,
        _read_layer_quantizers,
        "Format: a JSON file of it, or of a compressed model's config.",
    ),
}


def form_of(declared: Option) -> Form:
    """Return the form of an option's type."""
    return FORMS.get(declared.type, Form(declared.type))


def flag_of(declared: Option, name: str, default: Any = MISSING, more: str = "") -> tuple:
    """Return (name, type, field) of the flag of an option, for ``make_dataclass``."""
    form = form_of(declared)
    default = declared.default if default is MISSING else default
    if form.type in (list[str], list[float]) and not isinstance(default, list):
        default = [default]
    help = " ".join(filter(None, (declared.help, form.hint, more)))
    return name, form.type, option(None if default == {} else default, help)


_SCHEME_OPTIONS = {"ipq": options_of(IPQConfig), "fixed_point": options_of(FixedPointConfig)}
_WITHOUT_FLAG = {*RECORDS, "format_version", "seed"}


def _model_flags() -> list[tuple]:
    help = "Quantization scheme: product quantization in stages, or fixed point (intN)."
    flags = [("scheme", Literal["ipq", "fixed_point"], option("ipq", help))]
    shared = options_of(QuantizedModelConfig)
    options = {**_SCHEME_OPTIONS["ipq"], **_SCHEME_OPTIONS["fixed_point"]}
    names = [name for name in options if name not in shared] + list(shared)
    for name in (name for name in names if name not in _WITHOUT_FLAG):
        # Without a default for bits, --bits 8 under --scheme ipq can be refused.
        more = {"default": None, "more": "Default: 8."} if name == "bits" else {}
        flags.append(flag_of(options[name], name, **more))
    return flags


class QuantizationFlags(make_dataclass("_QuantizationFlags", _model_flags())):
    """Flags of :class:`IPQConfig` and :class:`FixedPointConfig`, for ``HfArgumentParser``."""

    def given(self) -> list[str]:
        """Return the names of the flags whose values are not the defaults."""
        flags = options_of(QuantizationFlags).values()
        return [flag.name for flag in flags if getattr(self, flag.name) != flag.default]

    def config(self, seed: int, with_noise: bool = True) -> QuantizedModelConfig:
        """Return the config of the compressed model; flags of another scheme raise an error.

        ``with_noise`` allows flags of another scheme that noise reads too.
        """
        noise = options_of(QuantNoiseConfig) if with_noise else {}
        own = _SCHEME_OPTIONS[self.scheme]
        for scheme, options in _SCHEME_OPTIONS.items():
            if wrong := (options.keys() - own.keys() - noise.keys()).intersection(self.given()):
                raise ValueError(
                    f"--{min(wrong)} {getattr(self, min(wrong))} requires --scheme {scheme} (got "
                    f"--scheme {self.scheme}); remove one of them"
                )
        flags = {name: name for name in options_of(QuantizationFlags)}
        return config_from_flags(SCHEMES[self.scheme], flags, vars(self), seed)


def config_from_flags(
    config: Callable[..., Config], flags: Mapping[str, str], values: Mapping[str, Any], seed: int
) -> Config:
    """Return a config with the values of flags; errors name the flag.

    ``flags`` maps options to flags (options of other configs are skipped), and ``values`` flags to
    arguments (None takes the default of the config).
    """
    options = options_of(config)
    arguments = {
        name: form_of(options[name]).read(flag, values[flag])
        for name, flag in flags.items()
        if name in options and values[flag] is not None
    }
    with errors_name_flags(flags):
        return config(**arguments, seed=seed)


@contextmanager
def errors_name_flags(flags: Mapping[str, str]) -> Iterator[None]:
    """Replace the name of an option by that of its flag in the error of an invalid value."""
    try:
        yield
    except ValueError as error:
        match = re.match(r"invalid (\w+)(=?)(.*)", str(error), re.DOTALL)
        if match is None or match[1] not in flags:
            raise
        raise ValueError(f"invalid --{flags[match[1]]}{' ' * len(match[2])}{match[3]}") from error
