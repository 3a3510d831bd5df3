"""Convolutions: the block rules of section 7.8, noise, packing, and the buffers of BatchNorm."""

import pytest
import torch
from support.tiny import IMAGE_SIZE, VISION_MAKERS, make_vision_model
from torch import nn
from transformers import AutoModelForImageClassification

from hf_quantnoise import (
    AutoQuantizedModel,
    IPQConfig,
    QuantNoiseConfig,
    apply_quant_noise,
    quantize_model,
    remove_quant_noise,
    size_report,
)
from hf_quantnoise.blocks import to_blocks, weight_matrix
from hf_quantnoise.modeling import packed_layers
from hf_quantnoise.noise import find_state
from hf_quantnoise.structure import block_size_of, find_layers


def pixels(seed: int = 1) -> torch.Tensor:
    return torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(pixel_values=pixels()).logits


@pytest.mark.parametrize(
    ("conv", "block"),
    [
        (nn.Conv2d(16, 8, 1), 1),
        (nn.Conv2d(16, 8, 1, groups=4), 1),
        (nn.Conv2d(16, 16, 3, groups=16), 9),
        (nn.Conv2d(16, 16, 5, stride=2, padding=2, groups=16), 5),
        (nn.Conv2d(3, 8, 7, stride=2), 7),
        (nn.Conv2d(3, 8, (11, 1)), 11),
        (nn.Conv2d(16, 8, 3, dilation=2), 9),
        (nn.Conv2d(16, 8, 3, groups=2), 9),
        (nn.Conv2d(16, 8, (1, 3)), 3),
        (nn.Conv2d(3, 8, 4, stride=4), 1),  # patches that do not overlap: a Linear layer
        (nn.Conv1d(8, 16, 3, stride=2, dilation=2), 3),
        (nn.Conv1d(8, 16, 4, stride=4), 1),
        (nn.Conv1d(8, 16, 4, stride=4, groups=2), 4),
    ],
)
def test_block_size_of_convolutions(conv, block):
    (layer,) = find_layers(nn.Sequential(conv))
    assert layer.layer_type.kernel_block(conv) == block
    assert layer.group == "conv"
    expected = 4 if block == 1 else block
    assert block_size_of(4, layer) == expected
    assert block_size_of({"conv": 4}, layer) == expected
    assert block_size_of({"conv": 4, ".*": 2}, layer) == 2
    assert block_size_of({"ffn": 4}, layer) is None


def test_block_of_kernel_block_is_one_kernel():
    conv = nn.Conv2d(6, 4, 3, groups=2)
    blocks = to_blocks(weight_matrix(conv), 9).view(4, 3, 3, 3)
    assert torch.equal(blocks, conv.weight)


def test_block_of_large_kernel_is_one_row_of_it():
    conv = nn.Conv2d(4, 4, 5, groups=4)
    blocks = to_blocks(weight_matrix(conv), 5).view(4, 1, 5, 5)
    assert torch.equal(blocks, conv.weight)


def test_blocks_of_1x1_convolution_are_those_of_linear():
    conv, linear = nn.Conv2d(16, 8, 1), nn.Linear(16, 8)
    linear.weight.data.copy_(conv.weight[:, :, 0, 0])
    assert torch.equal(to_blocks(weight_matrix(conv), 4), to_blocks(weight_matrix(linear), 4))


@pytest.mark.parametrize("noise", ["proxy", "pq", "int4"])
@pytest.mark.parametrize("name", VISION_MAKERS)
def test_noise_trains_image_model_and_can_be_removed(name, noise):
    model = make_vision_model(name)
    clean = logits(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = QuantNoiseConfig(noise=noise, p=0.3, block_size=4, n_centroids=8)
    apply_quant_noise(model, config)
    assert torch.equal(logits(model), clean)
    assert any(isinstance(layer, nn.Conv2d) for layer in find_state(model).layers.values())
    model.train()
    # A forward may only write BatchNorm's running statistics.
    output = model(pixel_values=pixels(), labels=torch.tensor([0, 1, 2]))
    output.loss.backward()
    after = model.state_dict()
    assert before.keys() == after.keys()
    for key, value in model.named_parameters():
        assert torch.equal(before[key], value), key
        assert value.grad is not None and torch.isfinite(value.grad).all(), key
    model.load_state_dict(before)
    assert torch.equal(logits(remove_quant_noise(model)), clean)


@pytest.mark.parametrize("name", VISION_MAKERS)
def test_image_model_reloads_bit_equal(name, tmp_path):
    model = make_vision_model(name)
    groups = {layer.group for layer in find_layers(model)} - {"head"}
    config = IPQConfig(block_size=4, n_centroids=8, stages=sorted(groups))
    model = quantize_model(model, config, progress=False)
    assert any(isinstance(layer, nn.Conv2d) for _, layer in packed_layers(model))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    for loader in (AutoModelForImageClassification, AutoQuantizedModel):
        again, info = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert type(again).__name__ == type(model).__name__
        assert torch.equal(logits(again), expected)
        # BatchNorm's statistics are saved too.
        for key, value in model.named_buffers():
            assert torch.equal(value, again.get_buffer(key)), key
    size = (tmp_path / "model.safetensors").stat().st_size
    assert abs(size_report(model).total.disk_bytes - size) <= 0.01 * size
    dense = model.dequantize()
    torch.testing.assert_close(logits(dense), expected, rtol=1e-4, atol=1e-5)


def test_small_depthwise_layer_is_skipped_with_reason():
    model = make_vision_model("mobilenet-v2")
    config = IPQConfig(block_size=4, n_centroids=256, stages=["conv"])
    model = quantize_model(model, config, progress=False)
    left = model.config.quantization_config.left_dense
    assert any("blocks for 256 centroids" in reason for reason in left.values())
    assert "conv" in str(size_report(model))


def test_centroids_of_convolutions_get_gradients():
    model = make_vision_model("resnet")
    model = quantize_model(
        model, IPQConfig(block_size=4, n_centroids=16, stages=["conv"]), progress=False
    ).train()
    model(pixel_values=pixels(), labels=torch.tensor([0, 1, 2])).loss.backward()
    for name, layer in packed_layers(model):
        assert layer.weight_codebook.grad.abs().sum() > 0, name
