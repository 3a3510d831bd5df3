"""Statistics of BatchNorm against averages in float64."""

import math
from copy import deepcopy

import pytest
import torch
from support.norms import IMAGES, Net, inputs, stats
from support.processes import needs_gloo, on_two_ranks
from support.tiny import make_model, make_vision_model
from torch import nn

from hf_quantnoise import QuantNoiseConfig, apply_quant_noise, update_bn_stats
from hf_quantnoise.batch_norm import bn_stats_of_packed_weights, measure_bn_stats, tracking_norms


def averages(values):
    """Return the averages of mean and unbiased variance of float64 batches (n, features)."""
    means, variances = zip(*((v.mean(0), v.var(0)) for v in values), strict=True)
    return torch.stack(means).mean(0), torch.stack(variances).mean(0)


def assert_close(norm, mean, variance):
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), variance, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.9997, None])
def test_update_bn_stats_averages_all_calls_of_all_batches(momentum):
    model = Net().train()
    model.norm.momentum = momentum
    model.norm.running_mean.fill_(math.inf)
    before, modes = deepcopy(model), [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert update_bn_stats(model, inputs()) is model
    assert torch.equal(torch.get_rng_state(), state)

    calls, exact = [], deepcopy(before.layer).double()
    for batch in inputs():
        first = exact(batch["x"].double())
        second = (first - first.mean(0)) / (first.var(0, unbiased=False) + 1e-5).sqrt()
        calls += [first, second]
    assert_close(model.norm, *averages(calls))
    assert int(model.norm.num_batches_tracked) == 6
    assert model.norm.momentum == momentum and model.instance.momentum == 0.3
    assert [module.training for module in model.modules()] == modes
    for name in ("idle", "still", "frozen", "fixed"):
        norm, old = getattr(model, name), getattr(before, name)
        assert torch.equal(norm.running_mean, old.running_mean), name
        assert torch.equal(norm.running_var, old.running_var), name
    for key, value in model.named_parameters():
        assert torch.equal(value, before.get_parameter(key)) and value.grad is None


def test_update_bn_stats_averages_instance_norm():
    model = Net()
    update_bn_stats(model, inputs())
    seen = []
    model.instance.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].T.double()))
    model.norm.train()  # as while measuring
    for batch in inputs():
        model(**batch)
    assert_close(model.instance, *averages(seen))


def test_tracking_norms_omits_frozen_ones():
    model = Net()
    assert set(tracking_norms(model)) == {model.norm, model.idle, model.instance}
    assert not tracking_norms(make_model("bert"))
    text = make_model("bert")
    assert update_bn_stats(text, []) is text


def test_noisy_model_gets_statistics_of_original_weights():
    clean = make_vision_model("mobilenet-v1")
    noisy = apply_quant_noise(deepcopy(clean), QuantNoiseConfig(noise="proxy", p=0.9)).train()
    update_bn_stats(noisy, [IMAGES])
    assert noisy.training
    update_bn_stats(clean, [IMAGES])
    for key, value in stats(clean).items():
        assert torch.equal(noisy.state_dict()[key], value), key


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], ["invalid batches", "expected at least one"]),
        ([{"x": torch.zeros(5, 6)}, {"x": torch.zeros(5, 7)}], ["invalid batches", "x (5, 7)"]),
        ([{"x": torch.zeros(1, 6)}], ["Expected more than 1 value per channel"]),
    ],
)
def test_update_bn_stats_that_fails_changes_nothing(batches, words):
    model = Net().train()
    before = stats(model)
    with pytest.raises(ValueError) as error:
        update_bn_stats(model, batches)
    assert all(word in str(error.value) for word in words)
    assert all(torch.equal(value, before[key]) for key, value in stats(model).items())
    assert model.training and model.norm.momentum == 0.9997


@needs_gloo
def test_ranks_average_over_all_batches(tmp_path):
    piece = """
from hf_quantnoise import update_bn_stats
from support.norms import Net, inputs

model = update_bn_stats(Net(), inputs()[rank::2])
found["state"] = model.state_dict()
found["error"] = error_of(update_bn_stats, model, inputs() if rank else [])
"""
    ranks = on_two_ranks(piece, tmp_path)
    expected = update_bn_stats(Net(), inputs()).state_dict()
    for found in ranks:
        for key, value in expected.items():
            torch.testing.assert_close(found["state"][key], value, msg=key)
        assert found["error"].startswith("ValueError: invalid batches: got none")


def test_sync_batch_norm_gets_the_same_statistics():
    model = update_bn_stats(nn.SyncBatchNorm.convert_sync_batchnorm(Net()), inputs())
    assert type(model.norm) is nn.SyncBatchNorm
    expected = stats(update_bn_stats(Net(), inputs()))
    for key, value in stats(model).items():
        assert torch.equal(value, expected[key]), key


# ---- the change by packing -----------------------------------------------------------------------


def test_packed_weights_change_statistics_as_those_of_batches():
    model = Net()
    model.norm.running_mean.fill_(3.0)
    model.norm.running_var.fill_(5.0)
    tensor = model.norm.running_mean

    def measure():
        return measure_bn_stats(model, inputs(), lambda batch: model.norm(model.layer(batch["x"])))

    before = averages([model.layer(batch["x"]).double() for batch in inputs()])
    with bn_stats_of_packed_weights(model, measure), torch.no_grad():
        model.layer.weight.mul_(2)
    after = averages([model.layer(batch["x"]).double() for batch in inputs()])
    ratio = (after[1] + 1e-5) / (before[1] + 1e-5)
    assert_close(model.norm, 3 + after[0] - before[0], 5 * ratio)
    assert tensor.eq(3).all()  # so that a snapshot of the model can restore it


def test_unchanged_weights_keep_statistics():
    model = Net()
    before = stats(update_bn_stats(model, inputs()))
    with bn_stats_of_packed_weights(
        model, lambda: measure_bn_stats(model, inputs(1), lambda batch: model(**batch))
    ):
        pass
    for key, value in stats(model).items():
        assert torch.equal(value, before[key]), key
