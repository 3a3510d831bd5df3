"""Options of the configs, each declared once: a dataclass field with type, default, check and help.

    bits: Annotated[int, integer(1, 8)] = option(8, "Bits per weight.")

Command-line flags (``flags.py``) and the page docs/reference/configuration.md (written by
``docs/write_configuration.py``) are made from these fields.

``huggingface_hub.dataclasses`` is not used for the checks: its errors span several lines, it
refuses an int for a float, and its metadata cannot be passed to ``HfArgumentParser``.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from inspect import getdoc
from numbers import Integral, Real
from typing import Annotated, Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

from ..argument_checks import describe, require_instance
from ..registry import suggestion
from .checks import Check, regexes_not_compiled

logger = logging.getLogger(__name__)

Class = TypeVar("Class", bound=type)


def option(default: Any, help: str) -> Any:
    """Return the dataclass field of an option. Help is for ``--help`` and the docs: no markup."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.copy(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Option:
    """A declared option."""

    name: str
    type: Any  # of its values, without the checks
    default: Any
    help: str
    checks: tuple[Check, ...]  # called with name and value, unless the value is an allowed None


@cache
def options_of(config: type) -> dict[str, Option]:
    """Return the options of a dataclass by name, in the order of its fields."""
    hints = get_type_hints(config, include_extras=True)
    options = {}
    for f in fields(config):
        hint, checks = hints[f.name], ()
        if get_origin(hint) is Annotated:
            hint, *checks = get_args(hint)
        default = f.default if f.default_factory is MISSING else f.default_factory()
        help = f.metadata.get("help", "")
        options[f.name] = Option(f.name, hint, default, help, tuple(checks))
    return options


def changed_options(config: Any) -> dict[str, Any]:
    """Return the options of a config that do not have their default."""
    options = options_of(type(config)).values()
    values = {option.name: getattr(config, option.name) for option in options}
    return {o.name: values[o.name] for o in options if values[o.name] != o.default}


class Options:
    """Base of the config dataclasses: checks values, and suggests the name of a misspelt one."""

    # Option of an earlier version -> why it was removed. Files and command lines that name one are
    # read with a warning.
    removed: ClassVar[Mapping[str, str]] = {}

    # Whether arguments need a name: the first field of a subclass is that of its base.
    keywords_only: ClassVar[bool] = False

    def __new__(cls, *args: Any, **kwargs: Any):
        if args and cls.keywords_only:
            first = next(name for name in options_of(cls) if name in cls.__annotations__)
            raise TypeError(
                f"invalid argument of {cls.__name__}: got {describe(args[0])} without a name, "
                f"expected keywords only; write e.g. {cls.__name__}({first}=...)"
            )
        for name in kwargs.keys() - options_of(cls).keys():
            hint = unknown_option(cls, name)
            raise TypeError(f"{cls.__name__}() got an unexpected keyword argument {name!r}{hint}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, declared in options_of(type(self)).items():
            value = _as_from_json(getattr(self, name))
            setattr(self, name, value)
            if value is not None or type(None) not in get_args(declared.type):
                for check in declared.checks:
                    check(name, value)


def _as_from_json(value: Any) -> Any:
    """Return a value as its JSON is read: with lists for tuples, and Python's types for numpy's.

    JSON refuses those of numpy, when the config is saved.
    """
    if isinstance(value, list | tuple):
        return [list(part) if isinstance(part, tuple) else _plain(part) for part in value]
    return _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, int | float) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def unknown_option(config: type[Options], name: str) -> str:
    """Return the end of an error about an unknown name: why it was removed, or a suggestion."""
    if name in config.removed:
        return f" (removed: {config.removed[name]})"
    known = options_of(config)
    return suggestion(name, known) or f"; known: {', '.join(known)}"


def drop_removed(removed: Mapping[str, str], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a file without removed options, each of which is warned about."""
    for name in values:
        if name in removed:
            warn_removed(name, removed[name])
    return {name: value for name, value in values.items() if name not in removed}


def warn_removed(name: str, reason: str) -> None:
    """Warn that an option of an earlier version no longer has an effect."""
    logger.warning("%s was removed and has no effect: %s.", name, reason)


def from_file(config: type[Any], values: Mapping[str, Any]) -> Any:
    """Return the config that a JSON file holds; unknown fields raise an error."""
    with regexes_not_compiled():
        return config(**values_of_file(config, values))


def values_of_file(config: type[Options], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments that a config's JSON holds; unknown fields raise an error."""
    require_instance(config.__name__, values, Mapping, "a dict of its fields", "see to_dict()")
    values = drop_removed(config.removed, values)
    for name in values.keys() - options_of(config).keys():
        hint = unknown_option(config, name)
        raise ValueError(f"unknown field {name!r} of {config.__name__}{hint}")
    return values


def documented(config: Class) -> Class:
    """Append the options to a dataclass's docstring, for ``help()`` and notebooks."""
    lines = [f"    {name}: {declared.help}" for name, declared in options_of(config).items()]
    config.__doc__ = "\n".join([getdoc(config) or "", "", "Args:", *lines])
    return config
