"""The command line of all examples: model, noise, compression, and ``TrainingArguments``; each adds
its own data."""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from transformers import HfArgumentParser, TrainingArguments

from ..compression import CompressionArguments
from ..configuration import QuantNoiseConfig
from ..configuration.flags import (
    QuantizationFlags,
    parse_int_or_dict,
    parse_patterns,
    parse_share_layers,
)


@dataclass
class ModelArguments:
    """Which model to start from."""

    model_name_or_path: str = field(metadata={"help": "Checkpoint: a folder or a Hub repository."})
    config_name: str | None = field(
        default=None, metadata={"help": "Config, if it is another than the checkpoint's."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer, if it is another than the checkpoint's."}
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Where downloads and read data are kept."}
    )
    model_revision: str = field(
        default="main", metadata={"help": "Branch, tag or commit of the checkpoint."}
    )
    token: str | None = field(
        default=None, metadata={"help": "Hub token; default: the one of `hf auth login`."}
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32",
        metadata={"help": "Type in which weights are loaded and finetuned; auto: as stored."},
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Put a new head on a checkpoint that has another's."}
    )

    def hub(self) -> dict:
        """Keyword arguments of every ``from_pretrained``."""
        return {"cache_dir": self.cache_dir, "revision": self.model_revision, "token": self.token}


def _word_or_steps(text: str) -> str | int:
    return int(text) if text.isdigit() else text


@dataclass
class NoiseArguments:
    """Noise on the weights while finetuning (section 4 of the paper)."""

    noise: list[str] = field(
        default_factory=lambda: ["proxy"],
        metadata={"help": "proxy, mean, pq, int8, int4, ...; several are composed; none: plain."},
    )
    noise_rate: list[float] = field(
        default_factory=lambda: [0.1],
        metadata={"help": "Share of the blocks noised in each forward; one, or one per noise."},
    )
    noise_schedule: str = field(
        default="constant", metadata={"help": "constant, or steps over which the rate rises."}
    )
    noise_block_size: str | None = field(
        default=None, metadata={"help": "As --block_size, which is also the default."}
    )
    noise_n_centroids: str | None = field(
        default=None, metadata={"help": "Centroids of pq noise; default: --n_centroids."}
    )
    noise_block_selection: str = field(
        default="all", metadata={"help": "What is drawn: all (single blocks) or cluster."}
    )
    noise_observer: str | None = field(
        default=None, metadata={"help": "Range of intN noise; default: --observer."}
    )
    layerdrop: float = field(default=0.0, metadata={"help": "Rate of skipped layers."})
    layerdrop_ste: bool = field(
        default=False, metadata={"help": "Gradients as if no layer was skipped."}
    )
    codebook_update: str = field(
        default="epoch", metadata={"help": "Refresh of pq noise's codebooks: epoch, or steps."}
    )
    scale_update_steps: int = field(
        default=10, metadata={"help": "Steps between refreshes of intN noise's scales."}
    )
    noise_target_modules: str | None = field(
        default=None, metadata={"help": "Noised layers: a regex, or a JSON list of suffixes."}
    )
    noise_exclude_modules: str | None = field(
        default=None, metadata={"help": "Layers without noise; same form."}
    )

    def config(self, options: CompressionOptions, seed: int) -> QuantNoiseConfig | None:
        """The noise of the run; None for ``--noise none``."""
        if self.noise == ["none"]:
            return None
        single = len(self.noise) == 1
        return QuantNoiseConfig(
            noise=self.noise[0] if single else self.noise,
            p=self.noise_rate[0] if len(self.noise_rate) == 1 else self.noise_rate,
            block_size=(
                parse_int_or_dict("block_size", options.block_size)
                if self.noise_block_size is None
                else parse_int_or_dict("noise_block_size", self.noise_block_size)
            ),
            n_centroids=parse_int_or_dict(
                "n_centroids", self.noise_n_centroids or options.n_centroids
            ),
            block_selection=self.noise_block_selection,
            observer=self.noise_observer or options.observer,
            activation_bits=options.activation_bits,
            layerdrop=self.layerdrop,
            layerdrop_ste=self.layerdrop_ste,
            p_schedule=_word_or_steps(self.noise_schedule),
            codebook_update=_word_or_steps(self.codebook_update),
            scale_update_steps=self.scale_update_steps,
            share_layers=parse_share_layers(options.share_layers),
            target_modules=parse_patterns(self.noise_target_modules),
            exclude_modules=parse_patterns(self.noise_exclude_modules),
            seed=seed,
        )


@dataclass
class CompressionOptions(QuantizationFlags):
    """What the small model is to be, and whether it is made; how it is finetuned is in
    ``CompressionArguments``."""

    compress: bool = field(default=True, metadata={"help": "Compress the finetuned model."})
    resume_compression: bool = field(
        default=False,
        metadata={"help": "Go on with the compression of a run that was killed in it."},
    )
    teacher_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Another model to learn from in the stages, with the same labels."},
    )


@dataclass
class RunTrainingArguments(TrainingArguments):
    """Every flag of ``TrainingArguments``. With neither ``--do_train`` nor ``--do_eval`` a run does
    both; with one of them true it does what it is told, as other examples do; ``--do_train False``
    evaluates and compresses the checkpoint as it is."""

    do_train: bool | None = field(
        default=None, metadata={"help": "Finetune.", "nargs": "?", "const": True}
    )
    do_eval: bool | None = field(
        default=None, metadata={"help": "Evaluate.", "nargs": "?", "const": True}
    )

    def __post_init__(self) -> None:
        given_train, given_eval = self.do_train, self.do_eval
        self.do_train = not given_eval if given_train is None else given_train
        self.do_eval = not given_train if given_eval is None else given_eval
        super().__post_init__()


@dataclass
class Arguments:
    """All that the command line says."""

    words: list[str]
    model: ModelArguments
    data: Any
    noise: NoiseArguments
    options: CompressionOptions
    compression: CompressionArguments
    training: RunTrainingArguments

    @property
    def command(self) -> list[str]:
        """The words of the command line without secrets."""
        secrets = filter(None, (self.model.token, self.training.hub_token))
        words = self.words
        for secret in secrets:
            words = [word.replace(secret, "<TOKEN>") for word in words]
        return words

    def to_dict(self) -> dict:
        """A JSON-able dict without secrets."""
        parts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del parts["words"]
        training = parts.pop("training").to_dict()  # hides hub tokens
        values = {name: dataclasses.asdict(part) for name, part in parts.items()}
        values["model"]["token"] = "<TOKEN>" if self.model.token else None
        return {**values, "training": training}


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the list of all flags."""
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} --help lists what there is)\n")


def parse_arguments(
    data_class: type, description: str, argv: list[str] | None = None, prog: str | None = None
) -> Arguments:
    """Reads the command line, or a single JSON file of flags, as other examples do.

    Args:
        data_class: the example's dataclass of data flags.
        description: what ``--help`` begins with.
        argv: the words; None takes the process's own.
        prog: what they are the words of; None takes the process's name.
    """
    parser = _Parser(
        [
            ModelArguments,
            data_class,
            NoiseArguments,
            CompressionOptions,
            CompressionArguments,
            RunTrainingArguments,
        ],
        description=description,
        prog=prog,
    )
    argv = sys.argv[1:] if argv is None else list(argv)
    if len(argv) == 1 and argv[0].endswith(".json"):
        return Arguments(argv, *parser.parse_json_file(json_file=os.path.abspath(argv[0])))
    return Arguments(argv, *parser.parse_args_into_dataclasses(args=argv))
