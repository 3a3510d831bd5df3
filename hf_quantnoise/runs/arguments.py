"""Command line of all examples: model, data, noise, compression and ``TrainingArguments``."""

from __future__ import annotations

import dataclasses
import logging
import os
from argparse import SUPPRESS, Action
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
    TrainingArguments,
)

from ..argument_parsing import TRACEBACK, unknown_flags
from ..compression import CompressionArguments
from ..configuration import QuantizedModelConfig, QuantNoiseConfig
from ..configuration.flags import errors_name_flags
from ..configuration.options import drop_removed, option, options_of, warn_removed
from ..publishing.template import read_template
from ..registry import suggestion
from ..repository import missing_model
from .config_flags import ConfigFlags
from .example_data import FileArguments
from .flag_files import checked_values, read_flags
from .known_flags import ELSEWHERE, check_training_flags, elsewhere
from .recipe_flags import check_recipe, complete, flags_of, lengths, recipe_for
from .script import ScriptParser
from .tokenizers import load_tokenizer

logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    """The model to start from."""

    model_name_or_path: str = field(metadata={"help": "Checkpoint: a folder or a Hub repository."})
    config_name: str | None = option(None, "Config, if it is not the checkpoint's.")
    tokenizer_name: str | None = option(None, "Tokenizer, if it is not the checkpoint's.")
    cache_dir: str | None = option(None, "Folder for downloads and prepared data.")
    model_revision: str = option("main", "Branch, tag or commit of the checkpoint.")
    token: str | None = option(None, "Hub token; default: that of `hf auth login`.")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = option(
        "float32", "Type that weights are loaded and finetuned in; auto: as stored."
    )
    ignore_mismatched_sizes: bool = option(False, "Replace a head that is for other labels.")

    def hub(self) -> dict:
        """Return the keyword arguments of every ``from_pretrained``."""
        return {"cache_dir": self.cache_dir, "revision": self.model_revision, "token": self.token}

    def load_config(self) -> PretrainedConfig:
        """Load the config; the error of a missing checkpoint names the flag."""
        flag = "config_name" if self.config_name else "model_name_or_path"
        return load_config(flag, getattr(self, flag), **self.hub())

    def teacher_hub(self) -> dict:
        """Return :meth:`hub` for the teacher, whose revision is the default one."""
        return {name: value for name, value in self.hub().items() if name != "revision"}

    def load_teacher_config(self, name: str | None) -> PretrainedConfig | None:
        """Load the config of ``--teacher_name_or_path``; the error of a missing one names it."""
        if name is None:
            return None
        return load_config("teacher_name_or_path", name, **self.teacher_hub())

    def load_tokenizer(self) -> Any:
        """Load the tokenizer; the error of a missing one names the flag."""
        flag = "tokenizer_name" if self.tokenizer_name else "model_name_or_path"
        return load_tokenizer(flag, getattr(self, flag), **self.hub())

    def load_model(self, auto_class: Any, config: PretrainedConfig) -> PreTrainedModel:
        """Load the checkpoint with the head of a config."""
        stored = config.dtype
        if self.dtype == "float32" and stored not in (None, torch.float32):
            logger.warning("The checkpoint's weights are %s; they are loaded as float32.", stored)
        sizes = self.ignore_mismatched_sizes
        return self._load(
            auto_class, config=config, dtype=self.dtype, ignore_mismatched_sizes=sizes, **self.hub()
        )

    def _load(self, auto_class: Any, **kwargs: Any) -> PreTrainedModel:
        return auto_class.from_pretrained(self.model_name_or_path, **kwargs)


def load_config(flag: str, name: str, **kwargs: Any) -> PretrainedConfig:
    """Load the config of the checkpoint that a flag names."""
    try:
        return AutoConfig.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        reason = error if os.path.isdir(name) else missing_model(name, error)
        raise ValueError(f"invalid --{flag} {name!r}: cannot be loaded ({reason})") from None


@dataclass
class CompressionFlags(ConfigFlags):
    """Flags of noise and compressed model, and of the run."""

    compress: bool = option(True, "Compress the finetuned model.")
    resume_compression: bool = option(False, "Resume a run that was interrupted in compression.")
    teacher_name_or_path: str | None = option(
        None, "Teacher, with the same labels as the model; default: the finetuned model."
    )
    recipe: Literal["13x", "20x", "30x"] | None = option(
        None,
        "Compress to a file at least this many times smaller: flags that are not passed get the "
        f"values of hf_quantnoise.recipe for the model. {lengths()}",
    )
    card_template: str | None = option(
        None, "Jinja template of the model card, in place of the package's."
    )
    noise_after_finetuning: float = option(
        0.0,
        "Finetune without noise, then train with noise for this many times --num_train_epochs (or "
        "--max_steps), with the finetuned model as teacher (section 5.3). 0: finetune with noise.",
    )
    noise_learning_rate: float | None = option(
        None, "Learning rate of --noise_after_finetuning. None: --learning_rate."
    )


@dataclass
class RunTrainingArguments(TrainingArguments):
    """``TrainingArguments`` in which ``--do_train`` and ``--do_eval`` have other defaults.

    Without both flags a run does both, unless ``--do_predict`` is passed. If only one is passed,
    the other is its opposite.
    """

    do_train: bool | None = field(
        default=None, metadata={"help": "Finetune.", "nargs": "?", "const": True}
    )
    do_eval: bool | None = field(
        default=None, metadata={"help": "Evaluate.", "nargs": "?", "const": True}
    )

    def __post_init__(self) -> None:
        given_train, given_eval = self.do_train, self.do_eval
        if given_train is None and given_eval is None and self.do_predict:
            given_train = given_eval = False
        self.do_train = not given_eval if given_train is None else given_train
        self.do_eval = not given_train if given_eval is None else given_eval
        super().__post_init__()


@dataclass
class Arguments:
    """A parsed command line (``words``), and the configs that its flags make."""

    words: list[str]
    model: ModelArguments
    data: Any
    flags: CompressionFlags
    compression: CompressionArguments
    training: RunTrainingArguments
    recipe: str | None = None  # what --recipe did
    allocated_family: str | None = None  # of the recipe, if it allocates bits after the finetuning
    noise_selection: dict[str, Any] = field(default_factory=dict)  # passed, if it allocates bits
    noise: QuantNoiseConfig | None = field(init=False)
    quantization: QuantizedModelConfig = field(init=False)

    def __post_init__(self) -> None:
        self.data.check_quantization(self.flags)
        read_template(self.flags.card_template)
        self.noise = self.flags.noise_config(self.training.seed)
        self.quantization = self.flags.config(self.training.seed)
        check_training_flags(self)

    @property
    def finetunes_stages(self) -> bool:
        """Whether the stages train, which needs training data even without ``--do_train``."""
        return self.flags.compress and self.compression.trains(self.quantization.stage_groups())

    @property
    def distills(self) -> bool:
        """Whether anything is trained with a teacher."""
        trains = self.finetunes_stages or self.flags.noise_after_finetuning > 0
        return self.compression.distill and trains

    @property
    def needs_train_data(self) -> bool:
        """Whether anything is trained."""
        trains_after = self.finetunes_stages or self.flags.noise_after_finetuning > 0
        return bool(self.training.do_train) or trains_after

    @property
    def splits(self) -> list[str]:
        """The splits that the run needs, of ``"train"``, ``"validation"`` and ``"test"``."""
        needed = {
            "train": self.needs_train_data,
            "validation": self.training.do_eval,
            "test": self.training.do_predict,
        }
        return [split for split, is_needed in needed.items() if is_needed]

    def require_train_data(self) -> None:
        """Raise a ``ValueError`` if compression needs training data and there is none."""
        if self.training.do_train or not self.needs_train_data or self.data.has_train_data:
            return
        if (length := self.flags.noise_after_finetuning) > 0:
            raise ValueError(
                f"--noise_after_finetuning {length:g} trains, which requires --train_file; pass it"
            )
        raise ValueError(
            f"--stage_epochs {self.compression.stage_epochs} finetunes in the stages, which "
            "requires --train_file; pass it, or --stage_epochs 0 to quantize without finetuning"
        )

    @property
    def command(self) -> list[str]:
        """The words of the command line without secrets."""
        words = self.words
        for secret in filter(None, (self.model.token, self.training.hub_token)):
            words = [word.replace(secret, "<TOKEN>") for word in words]
        return words

    def to_dict(self) -> dict:
        """Return the flags as a JSON-able dict without secrets."""
        parts = ("model", "data", "flags", "compression")
        values = {name: dataclasses.asdict(getattr(self, name)) for name in parts}
        values["model"]["token"] = "<TOKEN>" if self.model.token else None
        return {**values, "training": self.training.to_dict()}  # which hides hub tokens


class _RemovedFlag(Action):
    """A flag of an earlier version: accepted, with a warning."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        name = self.option_strings[0].removeprefix("--")
        warn_removed(option_string, CompressionArguments.removed[name])


class RunParser(ScriptParser):
    """Parser of an example's dataclasses, or of one JSON file with their fields."""

    def __init__(self, data_class: type[FileArguments], **kwargs: Any) -> None:
        self.data_class = data_class
        self.elsewhere = {**ELSEWHERE, **data_class.elsewhere}
        flags = (ModelArguments, data_class, CompressionFlags, CompressionArguments)
        super().__init__([*flags, RunTrainingArguments], **kwargs)
        for name in CompressionArguments.removed:
            names = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
            self.add_argument(
                *names, action=_RemovedFlag, nargs="?", default=SUPPRESS, help=SUPPRESS
            )

    def parse(self, words: list[str]) -> Arguments:
        """Parse a command line, or the single JSON file that it names."""
        words = [word for word in words if word != TRACEBACK]
        from_file = bool(words) and words[0].endswith(".json")
        if from_file and len(words) > 1:
            raise ValueError(
                f"{words[0]} is a file of flags, which cannot be combined with others "
                f"({' '.join(words[1:])}); add them to the file"
            )
        parse = partial(self._read_file, words[0]) if from_file else partial(self._parse, words)
        model, _, flags, *_ = parts = parse({})
        if flags.recipe is None:
            return Arguments(words, *parts)
        check_recipe(flags)
        settings = recipe_for(flags.recipe, self.data_class.auto_class, model.load_config())
        values = flags_of(settings)
        arguments = Arguments(words, *parse(values))
        complete(arguments, settings, values)
        return arguments

    def _parse(self, words: list[str], defaults: Mapping[str, Any]) -> tuple:
        self.set_defaults(**defaults)
        names = {name: name for name in options_of(CompressionArguments)}
        with errors_name_flags(names):
            *parts, unknown = self.parse_args_into_dataclasses(words, return_remaining_strings=True)
        if unknown:
            other = elsewhere(unknown, self.elsewhere)
            raise ValueError(other or unknown_flags(unknown, self._option_string_actions))
        return tuple(parts)

    def _read_file(self, file_name: str, defaults: Mapping[str, Any]) -> tuple:
        values = drop_removed(CompressionArguments.removed, read_flags(file_name))
        known = {f.name for kind in self.dataclass_types for f in dataclasses.fields(kind)}
        for name in values:
            if name not in known:
                hint = elsewhere([name], self.elsewhere)
                hint = f": {hint}" if hint else suggestion(name, known)
                raise ValueError(f"unknown field {name!r} in {file_name}{hint}")
        values = checked_values(values, self, self.dataclass_types, file_name)
        return self.parse_dict({**defaults, **values})
