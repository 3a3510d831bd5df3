"""Nothing that averages, clips, casts or re-enables gradients changes codes."""

import copy
import io

import pytest
import torch
from accelerate import Accelerator
from support.stacked import inputs_of, make_stacked
from support.stored import PQ, tensors_of
from support.tiny import make_model
from support.zoo import ZOO, ipq_config
from torch import nn
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
)
from transformers import Trainer, TrainingArguments

from hf_quantnoise import FixedPointConfig, IPQConfig, quantize_model

BATCH = inputs_of("bert") | {"labels": torch.tensor([0, 1])}
CONFIGS = {
    "pq": IPQConfig(**PQ, codebook_bits=8, activation_bits=8),
    "additive": IPQConfig(block_size=8, n_centroids=16, n_codebooks=2, row_scale=True),
    "int8": FixedPointConfig(bits=8, activation_bits=8),
    "int4 per channel": FixedPointConfig(bits=4, observer="channel"),
}


@pytest.fixture(scope="module", params=CONFIGS)
def packed(request):
    return quantize_model(
        make_model("bert"), CONFIGS[request.param], calibration_data=[inputs_of("bert")],
        progress=False,
    )  # fmt: skip


@pytest.fixture
def model(packed):
    return copy.deepcopy(packed)


def fixed_of(model):
    """Return copies of all that is never trained."""
    found = {
        name: tensor.detach().clone()
        for name, tensor in tensors_of(model).items()
        if name.endswith(("weight_indices", "input_scale", "input_zero_point"))
    }
    assert any(name.endswith("weight_indices") for name in found)
    return found


def assert_kept(model, before, rtol=0.0):
    after = fixed_of(model)
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        if name.endswith("weight_indices"):
            assert tensor.dtype == torch.uint8 and torch.equal(tensor, before[name]), name
        torch.testing.assert_close(
            tensor.float(),
            before[name].float(),
            rtol=rtol,
            atol=0,
            equal_nan=True,
            msg=lambda text, n=name: n,
        )


def train(model, optimizer, steps=3):
    model.train()
    for _ in range(steps):
        loss = model(**BATCH).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.isfinite(loss)


# ---- averages ------------------------------------------------------------------------------------

AVERAGES = {
    "SWA": {},
    "EMA": {"avg_fn": get_ema_avg_fn(0.9999)},
    "EMA, many": {"multi_avg_fn": get_ema_multi_avg_fn(0.9999)},
    "SWA, one": {"avg_fn": get_swa_avg_fn()},
    "SWA, many": {"multi_avg_fn": get_swa_multi_avg_fn()},
}


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("average", AVERAGES)
def test_averaged_model_averages_centroids_only(average, use_buffers, model):
    before = fixed_of(model)
    averaged = AveragedModel(model, use_buffers=use_buffers, **AVERAGES[average])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(4):
        train(model, optimizer, steps=1)
        if use_buffers and average == "SWA, many":  # torch divides no integers, of any model
            with pytest.raises(RuntimeError, match=r"[Ii]nteger"):
                averaged.update_parameters(model)
                averaged.update_parameters(model)
            return
        averaged.update_parameters(model)
    assert_kept(model, before)
    assert_kept(averaged.module, before, rtol=1e-6)
    pairs = zip(averaged.module.parameters(), model.parameters(), strict=True)
    assert any(not torch.equal(one, other) for one, other in pairs)
    averaged.module.eval()(**BATCH)


@pytest.mark.parametrize("keep_vars", [False, True])
def test_average_of_state_dicts_keeps_codes(keep_vars, model):
    """As timm's ModelEmaV2 and many training scripts do, over all tensors of the state dict."""
    before = fixed_of(model)
    ema = copy.deepcopy(model)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    own = ema.state_dict(keep_vars=keep_vars)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=keep_vars).items():
            own[name].copy_(0.9999 * own[name] + (1 - 0.9999) * tensor)
    assert_kept(ema, before, rtol=1e-6)


def test_soup_of_two_trainings_loads(model):
    before = fixed_of(model)
    other = copy.deepcopy(model)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    train(other, torch.optim.SGD(other.parameters(), lr=0.01))
    second = other.state_dict()
    soup = {
        name: (tensor + second[name]) / 2 if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(soup)
    assert_kept(model, before)
    all_averaged = {name: (t.float() + second[name].float()) / 2 for name, t in soup.items()}
    with pytest.raises(RuntimeError, match="expected packed codes"):
        model.load_state_dict(all_averaged)
    assert_kept(model, before)


def test_average_of_different_codes_raises():
    one, other = (
        quantize_model(make_model("bert", seed=seed), CONFIGS["int8"].__class__(bits=8))
        for seed in (0, 1)
    )
    averaged = AveragedModel(one, use_buffers=True, avg_fn=get_ema_avg_fn(0.5))
    averaged.update_parameters(one)
    with pytest.raises(ValueError, match=r"average of different codes.*dequantize"):
        averaged.update_parameters(other)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ZOO)
def test_zoo_trains_with_average(kind):
    dense = ZOO[kind].make()
    for config in (ipq_config(dense), CONFIGS["int4 per channel"]):
        model = quantize_model(copy.deepcopy(dense), config, progress=False)
        before = fixed_of(model)
        for parameter in model.parameters():
            parameter.requires_grad = True
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9999))
        model.train()(**ZOO[kind].batch()).loss.backward()
        torch.optim.SGD(model.parameters(), lr=1e-3, weight_decay=0.5).step()
        for _ in range(3):
            averaged.update_parameters(model)
        assert_kept(model, before)
        assert_kept(averaged.module, before)


# ---- gradients, casts and copies -----------------------------------------------------------------


def vector(model):
    values = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(values * 0.5, model.parameters())
    return model


def clip(model):
    model.train()(**BATCH).loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    nn.utils.clip_grad_value_(model.parameters(), 1e-6)
    return model


def all_trainable(model):
    for parameter in model.parameters():
        parameter.requires_grad = True
    model.requires_grad_(True)
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5))
    return model


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def lbfgs(model):
    """It flattens all parameters, and adds to each."""
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1e-3, max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = model(**BATCH).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    return model


def functional_gradient(model):
    if any(name.endswith("codebook_scale") for name, _ in model.named_buffers()):
        # Training fits this scale again in each forward, which torch.func does not allow.
        with pytest.raises(RuntimeError, match="would mutate a captured Tensor"):
            gradient_by_func(model)
    else:
        assert gradient_by_func(model).keys() == dict(model.named_parameters()).keys()
    return model


def gradient_by_func(model):
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(values):
        return torch.func.functional_call(model, (values, buffers), kwargs=BATCH).loss

    return torch.func.grad(loss)(parameters)


def prepared(model):
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    ready, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(ready(**BATCH).loss)
    accelerator.clip_grad_norm_(ready.parameters(), 1.0)
    optimizer.step()
    return accelerator.unwrap_model(ready)


WAYS = {
    "clip": clip,
    "bfloat16": lambda model: model.bfloat16(),
    "double": lambda model: model.double(),
    "to dtype": lambda model: model.to(torch.float16),
    "requires_grad": all_trainable,
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "vector": vector,
    "LBFGS": lbfgs,
    "torch.func.grad": functional_gradient,
    "accelerate": prepared,
    "share_memory": lambda model: model.share_memory(),
}


@pytest.mark.parametrize("way", WAYS)
def test_codes_are_kept(way, model):
    before = fixed_of(model)
    is_cast = way in ("bfloat16", "to dtype")
    assert_kept(WAYS[way](model), before, rtol=1e-2 if is_cast else 0.0)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw_torch", "adafactor"])
def test_trainer_keeps_codes(optimizer, model, parity_data, tmp_path):
    before = fixed_of(model)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, learning_rate=1e-2, weight_decay=0.5,
        optim=optimizer, max_grad_norm=0.1, use_cpu=True, report_to="none", disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=parity_data.select(range(16))).train()
    assert_kept(model, before)


def test_half_and_float_are_refused(model):
    """By transformers, for every quantized model."""
    before = fixed_of(model)
    for cast in (model.half, model.float):
        with pytest.raises(ValueError, match="not supported for quantized model"):
            cast()
    assert_kept(model, before)


def test_casts_keep_ties():
    model = quantize_model(make_stacked("gpt2", 1), CONFIGS["int8"].__class__(bits=8))
    table = model.transformer.wte
    for cast in (model.bfloat16, model.double, model.share_memory):
        cast()
        assert model.lm_head.weight_indices is table.weight_indices
        assert model.lm_head.weight_scale is table.weight_scale


def test_num_parameters_counts_trainable_values(model):
    """Codes are buffers; ``size_report`` has the sizes."""
    parameters = list(model.parameters())
    assert all(parameter.is_floating_point() for parameter in parameters)
    total = sum(parameter.numel() for parameter in parameters)
    assert model.num_parameters() == model.num_parameters(only_trainable=True) == total
    assert 0 < total < make_model("bert").num_parameters()
    codes = sum(tensor.nbytes for tensor in fixed_of(model).values())
    assert model.get_memory_footprint() >= codes
