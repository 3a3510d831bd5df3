"""Flags that people know from transformers' example scripts, and flags that a run cannot carry out.

A flag has the meaning that it has there, or it is refused: no flag is accepted and ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..configuration.checks import non_negative, positive
from ..configuration.flags import errors_name_flags

_REMOVE = "remove it"
# Flag of transformers' scripts, of any version -> what to do instead.
ELSEWHERE = {
    "config_overrides": "pass --config_name with a changed config",
    "evaluation_strategy": "use --eval_strategy",
    "group_by_length": "use --train_sampling_strategy group_by_length",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
    "low_cpu_mem_usage": _REMOVE,
    "model_type": "pass --model_name_or_path, since models are not trained from scratch",
    "no_cuda": "use --use_cpu",
    "overwrite_output_dir": f"{_REMOVE}, since the files of an earlier run are replaced",
    "per_gpu_eval_batch_size": "use --per_device_eval_batch_size",
    "per_gpu_train_batch_size": "use --per_device_train_batch_size",
    "preprocessing_num_workers": _REMOVE,
    "save_safetensors": f"{_REMOVE}, since safetensors files are always written",
    "streaming": f"{_REMOVE}, since the data is loaded completely",
    "torch_dtype": "use --dtype",
    "use_auth_token": "use --token",
    "use_fast_tokenizer": _REMOVE,
    "warmup_ratio": "use --warmup_steps with a number below 1",
}
TEXT_ELSEWHERE = {
    "keep_linebreaks": f"{_REMOVE}, since they are always kept",
    "max_length": "use --sequence_length",
    "max_seq_length": "use --sequence_length",
    "text_column_name": "use --text_column",
    "validation_split_percentage": "pass --validation_file",
}
GLUE_ELSEWHERE = {
    "dataset_config_name": "use --task_name",
    "dataset_name": "use --task_name, or --train_file and --validation_file",
    "max_length": "use --max_seq_length",
}
IMAGES_ELSEWHERE = {
    "dataset_config_name": "pass --train_file and --validation_file",
    "image_column_name": "use --image_column",
    "label_column_name": "use --label_column",
    "train_dir": "use --train_file, a parquet file of images",
    "train_val_split": "pass --validation_file",
    "validation_dir": "use --validation_file, a parquet file of images",
}
# Compression options without effect where nothing is distilled.
_OF_TEACHER = ("distill_hidden", "distill_attention", "random_tokens")


def elsewhere(flags: Iterable[str], known: Mapping[str, str]) -> str | None:
    """Return the error message for the first flag that has another name or no equivalent here."""
    for flag in flags:
        name = flag.partition("=")[0].removeprefix("--").replace("-", "_")
        if name in known:
            return f"--{name} is a flag of other scripts; {known[name]}"
    return None


def refuse(flag: str, value: Any, reason: str) -> ValueError:
    """Return the error of a flag that is known and cannot be carried out, to be raised."""
    return ValueError(f"--{flag} {value} {reason}")


def check_training_flags(args: Any) -> None:
    """Raise a ``ValueError`` that names the first training flag that the run would ignore.

    Args:
        args: the parsed :class:`Arguments` of a run.
    """
    training, flags = args.training, args.flags
    if training.do_predict and not args.data.predicts:
        raise refuse("do_predict", True, "is not supported by this task; evaluate with --do_eval")
    for name, default in _IGNORED.items():
        if (value := getattr(training, name, default)) != default:
            raise refuse(name, value, "is not supported; remove it")
    if training.prediction_loss_only and args.data.needs_predictions:
        raise refuse("prediction_loss_only", True, "leaves no predictions to score; remove it")
    _check_hub_flags(training)
    if (checkpoint := training.resume_from_checkpoint) is not None:
        skipped = "resumes finetuning, which {} skips; remove one of them"
        if flags.resume_compression:
            raise refuse(
                "resume_from_checkpoint", checkpoint, skipped.format("--resume_compression")
            )
        if not training.do_train:
            raise refuse("resume_from_checkpoint", checkpoint, skipped.format("--do_train False"))
    _check_noise_after_finetuning(args)
    for name in ("teacher_name_or_path", "resume_compression", "noise_after_finetuning"):
        if (value := getattr(flags, name)) and not flags.compress:
            raise refuse(name, value, "requires compression; remove it or --compress False")
    if args.distills:
        return
    given = {"teacher_name_or_path": flags.teacher_name_or_path}
    given |= {name: getattr(args.compression, name) for name in _OF_TEACHER}
    for name, value in given.items():
        if value:
            raise refuse(
                name,
                value,
                "requires --distill, and --stage_epochs above 0 or --noise_after_finetuning; "
                "remove it",
            )


def _check_noise_after_finetuning(args: Any) -> None:
    flags = args.flags
    with errors_name_flags(
        {name: name for name in ("noise_after_finetuning", "noise_learning_rate")}
    ):
        non_negative("noise_after_finetuning", flags.noise_after_finetuning)
        if flags.noise_learning_rate is not None:
            positive("noise_learning_rate", flags.noise_learning_rate)
    if flags.noise_after_finetuning and args.noise is None:
        raise refuse(
            "noise_after_finetuning",
            flags.noise_after_finetuning,
            "requires --noise; pass another than none",
        )
    if flags.noise_learning_rate is not None and not flags.noise_after_finetuning:
        raise refuse(
            "noise_learning_rate", flags.noise_learning_rate,
            "requires --noise_after_finetuning; pass it, or use --learning_rate",
        )  # fmt: skip


# Training flag that the metrics or the end of a run do not use -> its default.
_IGNORED = {
    "batch_eval_metrics": False,
    "eval_do_concat_batches": True,
    "hub_always_push": False,
    "include_for_metrics": [],
}
_HUB = ("hub_model_id", "hub_private_repo", "hub_revision")


def _check_hub_flags(training: Any) -> None:
    for name in _HUB:
        value = getattr(training, name, None)
        if value is not None and not training.push_to_hub:
            raise refuse(name, value, "requires --push_to_hub; pass it, or remove the flag")
    strategy = getattr(training.hub_strategy, "value", training.hub_strategy)
    if strategy not in ("every_save", "end"):
        raise refuse(
            "hub_strategy", strategy, "is not supported: only the final model is pushed; remove it"
        )
