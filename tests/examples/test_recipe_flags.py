"""``--recipe`` from the command line to the compressed model, and what it prints and refuses."""

import json
import shutil

import pytest
import torch

pytest.importorskip("datasets")

from support.trainers import assert_same, interrupted_noise
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, set_seed

from hf_quantnoise import IPQConfig, QuantNoiseConfig, recipe
from hf_quantnoise.modeling import packed_layers
from hf_quantnoise.noise import find_state, noised_layers
from hf_quantnoise.runs import post_training
from hf_quantnoise.runs.glue import main, parse

FLAGS = {
    "num_train_epochs": 8,
    "per_device_train_batch_size": 16,
    "learning_rate": 2e-3,
    "use_cpu": True,
    "disable_tqdm": True,
    "plots": False,
    "metrics": "sklearn",
    "recipe": "13x",
}


@pytest.fixture(scope="session")
def checkpoint(tiny_model, tmp_path_factory) -> str:
    """Folder of a random BERT that is large enough for a recipe, with a tokenizer."""
    folder = tmp_path_factory.mktemp("recipe") / "model"
    shutil.copytree(tiny_model, folder)
    config = BertConfig.from_pretrained(tiny_model, hidden_size=128, intermediate_size=512)
    set_seed(0)
    BertModel(config).save_pretrained(folder)
    return str(folder)


def words_of(folder, checkpoint, *words: str, **flags) -> list[str]:
    flags = {"model_name_or_path": checkpoint, "output_dir": folder, **FLAGS, **flags}
    return [word for name, v in flags.items() for word in (f"--{name}", str(v))] + list(words)


def test_run_with_a_recipe_ends_as_it_was_trained(
    checkpoint, write_sets, tmp_path, monkeypatch, capsys
):
    seen = {}
    train = post_training.QuantNoiseTrainer.train
    compress = post_training.QuantNoiseTrainer.compress

    def spy(trainer, *args, **kwargs):
        name = "finetuning" if trainer.qn_config is None else "noise"
        seen[name] = trainer
        seen[f"{name} teacher"] = trainer.given_teacher
        return train(trainer, *args, **kwargs)

    def spy_on_weights(trainer, *args, **kwargs):
        state = find_state(trainer.model)
        cpu = torch.device("cpu")
        seen["weights"] = {
            weight.names[0]: weight.noise.functions[0][1].decode(cpu, None).detach().clone()
            for weight in state.weights
        }
        return compress(trainer, *args, **kwargs)

    monkeypatch.setattr(post_training.QuantNoiseTrainer, "train", spy)
    monkeypatch.setattr(post_training.QuantNoiseTrainer, "compress", spy_on_weights)
    results = main(words_of(tmp_path / "out", checkpoint, *write_sets()))
    settings = recipe("13x", AutoModelForSequenceClassification.from_pretrained(checkpoint))

    # The finetuning has no noise; the finetuned model is the teacher.
    dense = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "dense")
    assert_same(dict(seen["noise teacher"].state_dict()), dict(dense.state_dict()))
    assert seen["finetuning teacher"] is None
    steps = [seen[name].state.max_steps for name in ("finetuning", "noise")]
    assert steps == [32, 32 * settings.length]

    # Bits are allocated to the finetuned model, and the noise has the blocks of the result.
    stored = IPQConfig.from_dict(results["quantization"])
    assert stored.layer_quantizers
    assert stored.target_size_mb == 4 * dense.num_parameters() / 13 / 1e6
    blocks = QuantNoiseConfig.matching(stored, dense).to_dict()
    noise = seen["noise"].qn_config.to_dict()
    assert noise == results["noise"]
    own = {"noise", "p", "learn_codebooks", "codebook_update"}
    assert {k: v for k, v in noise.items() if k not in own} == {
        k: v for k, v in blocks.items() if k not in own
    }
    assert {k: noise[k] for k in own} == {
        k: v for k, v in settings.noise.to_dict().items() if k in own
    }

    # The packed layers are those that were trained, and the file has the named size.
    small = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "compressed")
    packed = dict(packed_layers(small))
    schemes = [entry["scheme"] for entry in stored.layer_quantizers.values()]
    assert len(seen["weights"]) == schemes.count("pq") >= 10
    assert_same({name: packed[name].decode() for name in seen["weights"]}, seen["weights"])
    assert results["dense"]["bytes"] / results["compressed"]["bytes"] >= 13
    assert results["reloaded"]["metrics"]["accuracy"] >= 0.9
    assert results["reloaded"]["logits_bit_equal"]
    text = capsys.readouterr().out
    assert "--recipe 13x: encoder, " in text and "--noise_rate 1.0\n" in text
    assert "bits are allocated to the weights" in text and "total file size:" in text


def test_flags_that_are_passed_override_the_recipe(checkpoint, tmp_path):
    words = words_of(
        tmp_path, checkpoint, "--train_file", "a.csv", "--block_size", "4",
        noise_after_finetuning=0.5, codebook_learning_rate=0.1,
    )  # fmt: skip
    args = parse(words)
    assert args.quantization.block_size == args.noise.block_size == 4
    assert args.allocated_family is None  # the passed block size is used
    assert args.quantization.n_centroids == args.noise.n_centroids < 256
    assert args.noise.learn_codebooks and args.noise.p == 1.0
    assert args.flags.noise_after_finetuning == 0.5
    assert args.compression.codebook_learning_rate == 0.1 and args.compression.stage_epochs == 0
    assert "--codebook_learning_rate 0.1 (passed; recipe: 0.0005)" in args.recipe
    assert f"--n_centroids {args.quantization.n_centroids}\n" in args.recipe
    names = [word.removeprefix("--") for word in words[::2]]
    path = tmp_path / "flags.json"
    path.write_text(json.dumps(dict(zip(names, words[1::2], strict=True)) | VALUES))
    from_file = parse([str(path)])
    assert from_file.recipe == args.recipe
    assert from_file.noise == args.noise
    assert from_file.quantization.to_dict() == args.quantization.to_dict()


def test_own_selection_of_noise_keeps_the_bit_allocation(checkpoint, write_sets, tmp_path, capsys):
    words = ["--noise_exclude_modules", ".*query|.*token_type_embeddings"]
    files = write_sets()
    results = main(words_of(tmp_path / "out", checkpoint, *files, *words, num_train_epochs=2))
    stored = IPQConfig.from_dict(results["quantization"])
    assert stored.layer_quantizers
    assert results["dense"]["bytes"] / results["compressed"]["bytes"] >= 13
    dense = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "dense")
    noised = set(noised_layers(dense, QuantNoiseConfig.from_dict(results["noise"])))
    like_storage = set(noised_layers(dense, QuantNoiseConfig.matching(stored, dense)))
    assert noised == {name for name in like_storage if not name.endswith("query")} != like_storage
    text = capsys.readouterr().out
    assert "--recipe 13x: encoder, at least 13 times smaller with allocated bits" in text
    assert "Layers without noise by --noise_exclude_modules are stored with allocated" in text


# Passed flags -> whether bits are allocated, what the text has and what it has not.
TEXTS = {
    "": (True, "at least 13 times smaller with allocated bits", "without noise"),
    "--noise_target_modules .*layer.*": (True, "by --noise_target_modules are stored", "not al"),
    "--noise_exclude_modules .*query": (True, "by --noise_exclude_modules are stored", "not al"),
    "--block_size 8": (
        False, "not allocated to the weights, since --block_size 8 was passed", "smaller with",
    ),
    "--leftover_bits 16 --codebook_bits 8": (
        False, "since --leftover_bits 16 and --codebook_bits 8 were passed", "smaller with",
    ),
    "--noise_block_size 8": (False, "since --noise_block_size 8 was passed", "at least"),
    "--noise_after_finetuning 0": (
        False, "since --noise_after_finetuning 0.0 was passed", "After the finetuning",
    ),
    "--seed 5 --noise_observer channel": (True, "bits are allocated to the weights", "not al"),
}  # fmt: skip


@pytest.mark.parametrize("flags", TEXTS)
def test_text_of_a_recipe_says_whether_bits_are_allocated(flags, checkpoint, tmp_path):
    is_allocated, expected, unexpected = TEXTS[flags]
    args = parse(words_of(tmp_path, checkpoint, "--train_file", "a.csv", *flags.split()))
    assert (args.allocated_family == "encoder") == is_allocated
    assert expected in args.recipe and unexpected not in args.recipe


# With the types that JSON has.
VALUES = {"noise_after_finetuning": 0.5, "codebook_learning_rate": 0.1, **FLAGS}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scheme", "fixed_point"], "--recipe 13x requires --scheme ipq"),
        (["--target_size_mb", "2"], "--recipe 13x chooses the size, as --target_size_mb"),
        (["--noise", "none"], "--noise_after_finetuning 1.0 requires --noise"),
        (["--compress", "False"], "--noise_after_finetuning 1.0 requires compression"),
        (["--noise_after_finetuning", "-1"], "invalid --noise_after_finetuning -1.0"),
    ],
)
def test_invalid_flags_with_a_recipe_are_refused(words, message, checkpoint, tmp_path):
    with pytest.raises(ValueError, match=message):
        parse(words_of(tmp_path, checkpoint, "--train_file", "a.csv", *words))


@pytest.fixture
def teacher(checkpoint, tmp_path) -> str:
    """Folder of a classifier with half as many attention heads."""
    heads = BertConfig.from_pretrained(checkpoint).num_attention_heads // 2
    config = BertConfig.from_pretrained(
        checkpoint, num_attention_heads=heads, id2label={0: "cat", 1: "dog"}
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


def test_other_teachers_are_compared_before_the_finetuning(
    checkpoint, teacher, write_sets, tmp_path, monkeypatch
):
    files = [*write_sets(names=("cat", "dog")), "--teacher_name_or_path", teacher]

    def train(*args, **kwargs):
        raise AssertionError("trained, and then refused")

    monkeypatch.setattr(post_training.QuantNoiseTrainer, "train", train)
    with pytest.raises(ValueError, match="as many heads, or set distill_attention=0"):
        main(words_of(tmp_path / "out", checkpoint, *files, "--distill_attention", "1"))
    layers = ["--distill_hidden", "1", "--distill_layers", "9"]
    with pytest.raises(ValueError, match="distill_layers='9': the student has"):
        main(words_of(tmp_path / "out", checkpoint, *files[:-2], *layers))


def test_a_model_that_is_too_small_is_named(tiny_model, tmp_path):
    message = r"invalid --recipe '30x': .*BertForSequenceClassification.* at most \d+\.\d times"
    with pytest.raises(ValueError, match=message):
        parse(words_of(tmp_path, tiny_model, "--train_file", "a.csv", recipe="30x"))


def test_a_finetuned_model_needs_training_data(checkpoint, write_sets, tmp_path):
    files = write_sets()[2:]
    with pytest.raises(ValueError, match=r"--noise_after_finetuning 1 trains.*--train_file"):
        main(words_of(tmp_path / "out", checkpoint, *files, "--do_train", "False"))


def test_resumed_run_ends_with_the_same_model(checkpoint, write_sets, tmp_path, monkeypatch):
    files = [*write_sets(), "--save_steps", "3"]
    flags = {"num_train_epochs": 2}
    main(words_of(tmp_path / "complete", checkpoint, *files, **flags))

    with interrupted_noise(6):
        main(words_of(tmp_path / "stopped", checkpoint, *files, **flags))

    def refused(*args, **kwargs):
        raise AssertionError("a resumed run keeps the allocation it started with")

    monkeypatch.setattr(post_training, "allocate_bits", refused)
    main(words_of(tmp_path / "stopped", checkpoint, *files, "--resume_compression", **flags))
    one, other = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / name / "compressed")
        for name in ("complete", "stopped")
    )
    assert_same(dict(one.state_dict()), dict(other.state_dict()))
