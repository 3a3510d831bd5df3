"""Recipes: sizes, families, noise that fits the storage, and errors."""

import pytest
import torch
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MobileNetV1Config,
    MobileNetV1ForImageClassification,
    RobertaConfig,
    ViTConfig,
)

from hf_quantnoise import (
    QuantNoiseConfig,
    apply_quant_noise,
    count_lookups,
    quantize_model,
    recipe,
    size_report,
)
from hf_quantnoise.modeling.plan import make_plan
from hf_quantnoise.noise import noised_layers

MINILM = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}


def on_meta(model_class, config):
    with torch.device("meta"):
        make = getattr(model_class, "from_config", model_class)
        model = make(config)
    model.tie_weights()
    return model


ROBERTA = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
LLAMA = {"vocab_size": 8000, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6}
MODELS = {
    "minilm": (AutoModelForSequenceClassification, BertConfig(**MINILM), "encoder"),
    "roberta": (AutoModelForSequenceClassification, ROBERTA, "encoder"),
    "gpt2": (GPT2LMHeadModel, GPT2Config(n_layer=6, n_embd=384, n_head=6), "language_model"),
    # Its head is not tied to the table.
    "llama": (LlamaForCausalLM, LlamaConfig(**LLAMA), "language_model"),
    "mobilenet": (MobileNetV1ForImageClassification, MobileNetV1Config(), "image_model"),
}


@pytest.mark.parametrize("size", ["13x", "20x", "30x"])
@pytest.mark.parametrize("name", MODELS)
def test_recipe_reaches_its_size_and_its_noise_fits(name, size):
    model_class, config, family = MODELS[name]
    model = on_meta(model_class, config)
    settings = recipe(size, model)
    assert settings.family == family
    assert float(size[:-1]) <= settings.times_smaller < 1.6 * float(size[:-1])
    plan, *_ = make_plan(model, settings.quantization)
    packed = {layer.name for weights in plan.values() for w in weights for layer in w.layers}
    noised = set(noised_layers(model, settings.noise))
    assert noised == packed
    assert settings.noise.block_size == settings.quantization.block_size


@pytest.mark.parametrize("size", ["13x", "20x"])
def test_times_smaller_is_that_of_the_compressed_model(size):
    config = BertConfig(
        vocab_size=3000, hidden_size=128, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config)
    dense = sum(parameter.numel() for parameter in model.parameters()) * 4
    settings = recipe(size, model)
    batches = [{"input_ids": torch.arange(40)[None]}]
    small = quantize_model(model, settings.quantization, calibration_data=batches)
    assert size_report(small).total.disk_bytes == round(dense / settings.times_smaller)


def test_encoders_with_a_vocabulary_have_row_groups_at_small_sizes():
    bert = on_meta(AutoModelForSequenceClassification, BertConfig(**MINILM))
    assert recipe("13x", bert).quantization.frequent_rows is None
    settings = recipe("30x", bert)
    assert settings.quantization.frequent_rows == settings.noise.frequent_rows == 30522 // 4
    images = on_meta(AutoModelForImageClassification, ViTConfig())
    assert recipe("30x", images).quantization.frequent_rows is None


def test_recipe_without_a_model_is_for_one_of_base_size():
    settings = recipe("30x")
    model = on_meta(AutoModelForSequenceClassification, BertConfig())
    assert settings.quantization.to_dict() == recipe("30x", model).quantization.to_dict()
    text = repr(settings)
    assert text.startswith("Recipe(\n    size='30x',\n    family='encoder',\n")
    assert "noise=QuantNoiseConfig(noise='pq', p=1.0, " in text and "seed" not in text


def test_recipes_are_separate_objects():
    recipe("20x").quantization.block_size["ffn"] = 2
    assert recipe("20x").quantization.block_size["ffn"] != 2


def test_smaller_models_get_fewer_centroids():
    config = BertConfig(
        vocab_size=500, hidden_size=64, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = on_meta(AutoModelForSequenceClassification, config)
    assert recipe("13x", model).quantization.n_centroids < 256
    with pytest.raises(ValueError, match=r"invalid size='30x': .* at most \d+\.\d times smaller"):
        recipe("30x", model)


def test_invalid_arguments_are_named():
    with pytest.raises(ValueError, match=r"invalid size='31x': expected one of 13x, 20x, 30x"):
        recipe("31x")
    with pytest.raises(ValueError, match=r"invalid family='text': expected one of encoder"):
        recipe("30x", family="text")
    with pytest.raises(TypeError, match="invalid model"):
        recipe("30x", torch.nn.Linear(2, 2))


def test_noise_of_a_recipe_can_be_applied():
    model = AutoModelForSequenceClassification.from_config(
        BertConfig(vocab_size=3000, hidden_size=128, intermediate_size=512, num_hidden_layers=1,
                   num_attention_heads=2)
    )  # fmt: skip
    noise = recipe("13x", model).noise
    assert isinstance(noise, QuantNoiseConfig)
    apply_quant_noise(model, noise).train()
    assert model(input_ids=torch.arange(12)[None]).logits.isfinite().all()


def batches_of(config, n_batches=2):
    generator = torch.Generator().manual_seed(0)
    shape = (8, 16)
    return [
        {"input_ids": torch.randint(config.vocab_size, shape, generator=generator)}
        for _ in range(n_batches)
    ]


SMALL_MODELS = {
    "encoder": (
        AutoModelForSequenceClassification,
        BertConfig(
            vocab_size=3000, hidden_size=128, intermediate_size=512, num_hidden_layers=2,
            num_attention_heads=2,
        ),
    ),
    "language_model": (
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=1000, hidden_size=64, intermediate_size=192, num_hidden_layers=2,
            num_attention_heads=2, tie_word_embeddings=True,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", SMALL_MODELS)
def test_with_batches_bits_are_allocated(family):
    model_class, config = SMALL_MODELS[family]
    torch.manual_seed(0)
    model = getattr(model_class, "from_config", model_class)(config)
    settings = recipe("13x", model, batches=batches_of(config))
    assert settings.family == family
    assert settings.quantization.layer_quantizers
    assert settings.times_smaller == pytest.approx(13, rel=0.02) and settings.times_smaller >= 13
    assert recipe("13x", model).quantization.layer_quantizers == {}
    # The noise has the blocks of the storage, and the packed model is the trained one.
    apply_quant_noise(model, settings.noise, count_lookups(model, batches_of(config)))
    names = noised_layers(model, settings.noise)
    small = quantize_model(model, settings.quantization, calibration_data=batches_of(config))
    plan = small.config.quantization_config.plan
    assert set(names) == {name for name, entry in plan.items() if entry["scheme"] != "int"}
    dense = 4 * sum(parameter.numel() for parameter in on_meta(model_class, config).parameters())
    assert size_report(small).total.disk_bytes <= dense / 13


def test_batches_need_the_finetuned_model():
    with pytest.raises(ValueError, match="batches are given without a model"):
        recipe("13x", batches=[])


def narrow_model():
    """Return a model whose columns few block sizes of the recipes divide."""
    config = BertConfig(
        vocab_size=500, hidden_size=60, intermediate_size=240, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config)


def test_with_batches_block_sizes_do_not_decide_on_the_size():
    model = narrow_model()
    with pytest.raises(ValueError, match="invalid size='20x': the block sizes of the recipes"):
        recipe("20x", model)
    settings = recipe("20x", model, batches=batches_of(model.config))
    assert settings.quantization.layer_quantizers and settings.times_smaller >= 20


def test_size_that_bit_allocation_cannot_reach_is_named():
    model = narrow_model()
    message = r"invalid size='30x': bit allocation makes this BertFor\S+ with 0.13 M parameters at "
    with pytest.raises(ValueError, match=message + r"most 2\d\.\d times smaller; use a smaller"):
        recipe("30x", model, batches=batches_of(model.config))
