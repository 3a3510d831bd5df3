"""Error messages for wrong objects in place of a model, teacher, config or arguments."""

from functools import partial

import pytest
import torch
from support.mistakes import SMALL, Mistake, check_message, compress, quantize, trainer
from support.tiny import make_model
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    TextClassificationPipeline,
    TrainingArguments,
)

from hf_quantnoise import (
    CompressionArguments,
    FixedPointConfig,
    IPQConfig,
    QuantNoiseCallback,
    QuantNoiseConfig,
    QuantNoiseTrainer,
    allocate_bits,
    apply_quant_noise,
    export_aqlm,
    export_onnx,
    push_to_hub,
    quantize_model,
    remove_quant_noise,
    size_report,
    write_model_card,
)

TARGET = IPQConfig(target_size_mb=0.05)


def tokenizer():
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    )


def pipeline():
    return TextClassificationPipeline(model=make_model("bert"), tokenizer=tokenizer())


def on_meta():
    with torch.device("meta"):
        return make_model("bert")


def of_another_package():
    model = make_model("bert")
    model.is_quantized, model.quantization_method = True, "bitsandbytes"
    return model


def with_adapter():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(make_model("bert"), peft.LoraConfig(target_modules=["query"]))


def wrapped():
    return nn.Sequential(make_model("bert"))


# ---- models --------------------------------------------------------------------------------------

# What is passed as the model -> how it is made, and what identifies it in the message.
NOT_MODELS = {
    "a name": (lambda: "bert-base-uncased", "'bert-base-uncased'"),
    "None": (lambda: None, "None"),
    "a class": (lambda: BertForSequenceClassification, "BertForSequenceClassification"),
    "a config": (BertConfig, "BertConfig"),
    "a state dict": (lambda: make_model("bert").state_dict(), "OrderedDict"),
    "a list": (lambda: [make_model("bert")], "list"),
    "a function": (lambda: partial(make_model, "bert"), "partial"),
    "a tokenizer": (tokenizer, type(tokenizer()).__name__),
    "a pipeline": (pipeline, "TextClassificationPipeline"),
}
# Modules, but not models that can be packed.
UNPACKABLE = {
    "a layer": (lambda: nn.Linear(8, 8), "Linear"),
    "a wrapped model": (wrapped, "Sequential"),
    "a model with adapters": (with_adapter, "PeftModel"),
    "a model on meta": (on_meta, "word_embeddings"),
    "a model of another package": (of_another_package, "bitsandbytes"),
}
PACKED_CALLS = {
    "quantize_model": lambda model, folder: quantize_model(model, SMALL, progress=False),
    "allocate_bits": lambda model, folder: allocate_bits(model, TARGET, progress=False),
    "export_onnx": lambda model, folder: export_onnx(model, folder),
    "export_aqlm": lambda model, folder: export_aqlm(model, folder),
    "push_to_hub": lambda model, folder: push_to_hub(model, "me/small"),
    "write_model_card": lambda model, folder: write_model_card(model, folder),
}
CALLS = {
    **PACKED_CALLS,
    "apply_quant_noise": lambda model, folder: apply_quant_noise(model, QuantNoiseConfig()),
    "remove_quant_noise": lambda model, folder: remove_quant_noise(model),
    "size_report": lambda model, folder: size_report(model),
    "QuantNoiseCallback": lambda model, folder: QuantNoiseCallback(QuantNoiseConfig()).prepare(
        model
    ),
    "QuantNoiseTrainer": lambda model, folder: QuantNoiseTrainer(
        model, TrainingArguments(folder, use_cpu=True)
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", NOT_MODELS)
def test_object_that_is_not_a_model(kind, call, tmp_path):
    make, value = NOT_MODELS[kind]
    check_message(Mistake(lambda folder: CALLS[call](make(), folder), "model", value), tmp_path)


@pytest.mark.parametrize("call", ["quantize_model", "allocate_bits"])
@pytest.mark.parametrize("kind", UNPACKABLE)
def test_module_that_cannot_be_packed(kind, call, tmp_path):
    make, value = UNPACKABLE[kind]
    model = make()
    mistake = Mistake(lambda folder: PACKED_CALLS[call](model, folder), "model", value)
    check_message(mistake, tmp_path)
    assert not any(hasattr(module, "weight_indices") for module in model.modules())


@pytest.mark.parametrize(
    "kind", [name for name in NOT_MODELS if name != "None"] + ["a model on meta"]
)
def test_object_that_is_not_a_teacher(kind, tmp_path):
    make, value = (NOT_MODELS | UNPACKABLE)[kind]
    mistake = Mistake(lambda folder: compress(folder, teacher=make()), "teacher", value)
    check_message(mistake, tmp_path)


# ---- configs -------------------------------------------------------------------------------------

STRING, DICT = "ipq", {"block_size": 4}
NOISE_CONFIG, ARGUMENTS = QuantNoiseConfig(), CompressionArguments(stage_epochs=0)
# What is passed as a config -> the object, and what identifies it in the message.
NOT_CONFIGS = {
    "a name": (STRING, "'ipq'"),
    "None": (None, "None"),
    "a dict": (DICT, "{'block_size': 4}"),
    "a number": (8, "8"),
    "a list": ([SMALL], "list"),
    "the class": (IPQConfig, "IPQConfig"),
    "arguments": (ARGUMENTS, "CompressionArguments"),
}
CONFIG_CALLS = {
    "quantize_model": (lambda config, folder: quantize(config), "config"),
    "allocate_bits": (lambda config, folder: allocate_bits(make_model("bert"), config), "config"),
    "compress": (lambda config, folder: compress(folder, config), "config"),
    "matching": (lambda config, folder: QuantNoiseConfig.matching(config), "quantization_config"),
    "apply_quant_noise": (
        lambda config, folder: apply_quant_noise(make_model("bert"), config), "qn_config",
    ),
    "QuantNoiseCallback": (lambda config, folder: QuantNoiseCallback(config), "config"),
}  # fmt: skip


@pytest.mark.parametrize("call", CONFIG_CALLS)
@pytest.mark.parametrize("kind", NOT_CONFIGS)
def test_object_that_is_not_a_config(kind, call, tmp_path):
    config, value = NOT_CONFIGS[kind]
    run, field = CONFIG_CALLS[call]
    mistake = Mistake(lambda folder: run(config, folder), field, value)
    check_message(mistake, tmp_path)


def make_trainer(*arguments, **kwargs):
    return lambda folder: QuantNoiseTrainer(make_model("bert"), *arguments, **kwargs)


def swap_arguments(folder):
    QuantNoiseTrainer(make_model("bert"), NOISE_CONFIG, TrainingArguments(folder))


def load_on_the_fly(folder, config):
    make_model("bert").save_pretrained(folder)
    BertForSequenceClassification.from_pretrained(folder, quantization_config=config)


MISTAKES = {
    "trainer without model": Mistake(lambda folder: QuantNoiseTrainer(), "model", "None"),
    "trainer with config and args swapped": Mistake(swap_arguments, "args", "QuantNoiseConfig"),
    "trainer with a dict as args": Mistake(
        make_trainer({"output_dir": "out"}), "args", "{'output_dir': 'out'}"
    ),
    "trainer with a folder as args": Mistake(make_trainer("out"), "args", "'out'"),
    "trainer with a class as args": Mistake(
        make_trainer(TrainingArguments), "args", "TrainingArguments"
    ),
    "trainer with CompressionArguments": Mistake(
        make_trainer(ARGUMENTS), "args", "CompressionArguments"
    ),
    "compress with arguments as config": Mistake(
        lambda folder: trainer(folder).compress(ARGUMENTS, SMALL), "config", "CompressionArguments"
    ),
    "compress with TrainingArguments": Mistake(
        lambda folder: trainer(folder).compress(SMALL, TrainingArguments(folder)),
        "compression_args",
        "TrainingArguments",
    ),
    "compress with a dict of arguments": Mistake(
        lambda folder: trainer(folder).compress(SMALL, {"stage_epochs": 1}),
        "compression_args",
        "{'stage_epochs': 1}",
    ),
    "compress with a folder to resume": Mistake(
        lambda folder: compress(folder, resume="out/stage-1"),
        "resume_from_checkpoint",
        "'out/stage-1'",
    ),
    "compress with a report that is not a function": Mistake(
        lambda folder: trainer(folder).compress(SMALL, ARGUMENTS, report="yes"), "report", "'yes'"
    ),
    "teacher with other inputs": Mistake(
        lambda folder: compress(folder, teacher=nn.Linear(8, 8)), "teacher", "Linear"
    ),
    "model and config swapped": Mistake(
        lambda folder: quantize_model(SMALL, make_model("bert")), "model", "IPQConfig"
    ),
    "options without names": Mistake(lambda folder: IPQConfig(4), "IPQConfig", "4"),
    "bits without a name": Mistake(lambda folder: FixedPointConfig(4), "FixedPointConfig", "4"),
    "class of config in from_pretrained": Mistake(
        lambda folder: load_on_the_fly(folder, IPQConfig), "quantization_config", "IPQConfig"
    ),
    "from_dict of a name": Mistake(lambda folder: IPQConfig.from_dict("ipq"), "IPQConfig", "'ipq'"),
    "from_dict of None": Mistake(
        lambda folder: QuantNoiseConfig.from_dict(None), "QuantNoiseConfig", "None"
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_message_names_field_value_and_way_out(name, tmp_path):
    check_message(MISTAKES[name], tmp_path)
