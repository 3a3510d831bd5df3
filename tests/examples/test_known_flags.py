"""Flags of transformers' example scripts: supported with the same meaning, or refused."""

import json

import pytest

from hf_quantnoise.cli import main
from hf_quantnoise.runs import clm, glue, images
from hf_quantnoise.runs.known_flags import (
    ELSEWHERE,
    GLUE_ELSEWHERE,
    IMAGES_ELSEWHERE,
    TEXT_ELSEWHERE,
)

TASKS = {"glue": glue, "clm": clm, "images": images}
OWN = {"glue": GLUE_ELSEWHERE, "clm": TEXT_ELSEWHERE, "images": IMAGES_ELSEWHERE}
DATA = {
    "glue": ["--task_name", "sst2"],
    "clm": ["--dataset_name", "wikitext"],
    "images": ["--dataset_name", "cifar10"],
}
REFUSED = [(task, flag) for task in TASKS for flag in {**ELSEWHERE, **OWN[task]}]


def parse(task, folder, *flags):
    words = ["--model_name_or_path", "m", "--output_dir", str(folder), *DATA[task], *flags]
    return TASKS[task].parse(words)


@pytest.mark.parametrize(("task", "flag"), REFUSED)
def test_flag_of_other_scripts_names_its_equivalent(task, flag, tmp_path):
    with pytest.raises(ValueError, match=rf"^--{flag} is a flag of other scripts; \w+") as error:
        parse(task, tmp_path, f"--{flag}", "1")
    # What it names exists.
    for word in str(error.value).replace(",", "").split("; ")[1].split():
        if word.startswith("--"):
            options = TASKS[task].example.parser()._option_string_actions
            assert word in options


@pytest.mark.parametrize("task", TASKS)
def test_flag_of_other_scripts_in_a_json_file(task, tmp_path):
    path = tmp_path / "flags.json"
    path.write_text(json.dumps({"model_name_or_path": "m", "overwrite_output_dir": True}))
    with pytest.raises(ValueError, match=r"unknown field 'overwrite_output_dir'.*; remove it"):
        TASKS[task].parse([str(path)])


@pytest.mark.parametrize("task", TASKS)
def test_flags_with_the_same_meaning(task, tmp_path):
    args = parse(
        task, tmp_path, "--per_device_train_batch_size", "3", "--max_train_samples", "5",
        "--max_eval_samples", "6", "--do_train", "--seed", "7", "--gradient_accumulation_steps",
        "2", "--eval_strategy", "epoch", "--report_to", "none", "--load_best_model_at_end",
        "--save_strategy", "epoch", "--push_to_hub", "--hub_model_id", "me/m", "--hub_strategy",
        "end", "--warmup_steps", "0.1", "--resume_from_checkpoint", "out/checkpoint-1",
    )  # fmt: skip
    training = args.training
    assert (training.per_device_train_batch_size, training.seed) == (3, 7)
    assert (args.data.limit("train"), args.data.limit("validation")) == (5, 6)
    assert training.load_best_model_at_end and training.hub_model_id == "me/m"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--block_size", "512"], "--block_size 512: .*; use --sequence_length 512"),
        (["--block_size", "33"], "--sequence_length 33"),
        (["--block_size", "128", "--scheme", "fixed_point"], "--sequence_length 128"),
    ],
)
def test_block_size_of_run_clm_is_not_the_sequence_length(flags, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        parse("clm", tmp_path, *flags)
    assert parse("clm", tmp_path, "--block_size", "32").quantization.block_size == 32
    assert parse("clm", tmp_path, "--block_size", "ffn=64,embeddings=8,attention=8")


def test_block_size_of_finetune_clm_is_a_usage_error(tmp_path, capsys):
    words = ["--model_name_or_path", "m", "--output_dir", str(tmp_path), *DATA["clm"]]
    with pytest.raises(SystemExit) as stop:
        main(["finetune", "clm", *words, "--block_size", "1024"])
    assert stop.value.code == 2
    assert "use --sequence_length 1024" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "flags", "words"),
    [
        ("clm", ["--do_predict"], "--do_predict True"),
        ("images", ["--do_predict"], "--do_predict True"),
        *((task, ["--batch_eval_metrics"], "--batch_eval_metrics True") for task in TASKS),
        ("glue", ["--eval_do_concat_batches", "False"], "--eval_do_concat_batches False"),
        ("glue", ["--include_for_metrics", "loss"], "--include_for_metrics"),
        ("glue", ["--prediction_loss_only"], "--prediction_loss_only True"),
        ("images", ["--prediction_loss_only"], "--prediction_loss_only True"),
        ("glue", ["--hub_model_id", "me/m"], "--hub_model_id me/m requires --push_to_hub"),
        ("glue", ["--hub_private_repo", "True"], "--hub_private_repo True requires --push_to_hub"),
        ("glue", ["--push_to_hub", "--hub_strategy", "all_checkpoints"], "--hub_strategy all_c"),
        ("glue", ["--push_to_hub", "--hub_always_push"], "--hub_always_push True"),
        (
            "glue",
            ["--resume_from_checkpoint", "c", "--do_train", "False"],
            "--resume_from_checkpoint c .*--do_train False",
        ),
        (
            "glue",
            ["--resume_from_checkpoint", "c", "--resume_compression"],
            "--resume_from_checkpoint c .*--resume_compression",
        ),
        ("glue", ["--resume_compression", "--no_compress"], "--resume_compression True"),
        ("glue", ["--teacher_name_or_path", "t", "--no_compress"], "--teacher_name_or_path t"),
        ("glue", ["--teacher_name_or_path", "t", "--distill", "False"], "--teacher_name_or_path t"),
        ("glue", ["--teacher_name_or_path", "t", "--stage_epochs", "0"], "--teacher_name_or_path"),
        ("glue", ["--distill_hidden", "1", "--stage_epochs", "0"], "--distill_hidden 1.0 requires"),
        ("glue", ["--distill_attention", "1", "--no_compress"], "--distill_attention 1.0 requires"),
        ("clm", ["--random_tokens", ".5", "--stage_epochs", "0"], "--random_tokens 0.5 requires"),
    ],
)
def test_flag_that_would_be_ignored_is_refused(task, flags, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        parse(task, tmp_path, *flags)
