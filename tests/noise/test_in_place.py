"""Models may change a layer's output in place (BLIP adds positions to its embeddings).

Outputs of noisy and packed layers are separate tensors wherever those of dense layers are: the
result, and the gradients, are those of the same operation out of place.
"""

import copy

import pytest
import torch
from support.stacked import make_stacked
from torch import nn
from transformers import BlipTextConfig, BlipTextModel
from transformers.pytorch_utils import Conv1D

from hf_quantnoise import QuantNoiseConfig, apply_quant_noise
from hf_quantnoise.modeling import pack_layer
from hf_quantnoise.quantizers import FixedPointQuantizer, ProductQuantizer

ROWS = 48
IDS = torch.randint(0, ROWS, (2, 5), generator=torch.Generator().manual_seed(0))
MANY_IDS = IDS.repeat(8, 2)  # more than the table has rows: noise on the complete table


class ScaledEmbedding(nn.Embedding):
    def forward(self, input):
        return super().forward(input) * 2.0


def _normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


LAYERS = {
    "table": (lambda: nn.Embedding(ROWS, 16), IDS),
    "table, many ids": (lambda: nn.Embedding(ROWS, 16), MANY_IDS),
    "table with padding": (lambda: nn.Embedding(ROWS, 16, padding_idx=int(IDS[0, 0])), IDS),
    "scaled table": (lambda: ScaledEmbedding(ROWS, 16), IDS),
    "narrow table": (lambda: nn.Embedding(ROWS, 4), IDS),
    "linear": (lambda: nn.Linear(16, 24), _normal(2, 5, 16)),
    "linear without bias": (lambda: nn.Linear(16, 24, bias=False), _normal(5, 16)),
    "transposed linear": (lambda: Conv1D(24, 16), _normal(2, 5, 16)),
    "convolution": (lambda: nn.Conv2d(8, 16, 3, padding=1), _normal(2, 8, 6, 6)),
    "depthwise convolution": (lambda: nn.Conv1d(16, 16, 4, groups=16), _normal(2, 16, 9)),
}
NOISES = ["proxy", "mean", "pq", "int8", "int4", ["pq", "int8"]]
PACKED = {
    "pq": ProductQuantizer(block_size=4, n_centroids=4),
    "pq with row scale": ProductQuantizer(block_size=4, n_centroids=4, row_scale=True),
    "pq in 8 bits": ProductQuantizer(block_size=4, n_centroids=4, codebook_bits=8),
    "pq, rows not aligned": ProductQuantizer(block_size=4, n_centroids=5),
    "int8": FixedPointQuantizer(bits=8),
    "int3": FixedPointQuantizer(bits=3),
}


def in_place(output):
    output += 0.5
    output.mul_(1.5)
    output.masked_fill_(output > 2, 0.25)
    output[0].add_(1)
    return output.relu_()


def out_of_place(output):
    output = output + 0.5
    output = output * 1.5
    output = output.masked_fill(output > 2, 0.25)
    output = torch.cat([output[:1] + 1, output[1:]])
    return output.relu()


def outcome(layer, inputs, change, grad=True):
    """Return the changed output and the gradients of all parameters and of the inputs."""
    layer.zero_grad(set_to_none=True)
    inputs = inputs.clone()
    if grad and inputs.is_floating_point():
        inputs.requires_grad_()
    torch.manual_seed(3)
    with torch.set_grad_enabled(grad):
        output = change(layer(inputs))
    if not grad or not output.requires_grad:
        return [output]
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return [output.detach(), inputs.grad, *(p.grad for p in layer.parameters())]


def assert_equal_in_place(layer, inputs):
    before = copy.deepcopy(layer.state_dict())
    for grad in (True, False):
        expected, found = (outcome(layer, inputs, c, grad) for c in (out_of_place, in_place))
        assert len(expected) == len(found)
        for one, other in zip(expected, found, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
    after = layer.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("noise", NOISES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_noisy_output_can_be_changed_in_place(name, noise, p):
    torch.manual_seed(0)
    make, inputs = LAYERS[name]
    model = nn.Sequential(make())
    config = QuantNoiseConfig(noise=noise, p=p, block_size=4, n_centroids=4, target_modules=["0"])
    apply_quant_noise(model, config)
    for mode in (True, False):
        assert_equal_in_place(model.train(mode), inputs)


@pytest.mark.parametrize("activation_bits", [None, 8])
@pytest.mark.parametrize("quantizer", PACKED)
@pytest.mark.parametrize("name", LAYERS)
def test_packed_output_can_be_changed_in_place(name, quantizer, activation_bits):
    torch.manual_seed(0)
    make, inputs = LAYERS[name]
    layer = make()
    pack_layer(layer, PACKED[quantizer], activation_bits=activation_bits)
    if layer.activation_bits is not None:
        nn.init.constant_(layer.input_scale, 0.02)
        nn.init.constant_(layer.input_zero_point, 128.0)
    for mode in (True, False):
        assert_equal_in_place(layer.train(mode), inputs)


def test_blip_trains_with_noise():
    torch.manual_seed(0)
    config = BlipTextConfig(
        hidden_size=32, encoder_hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, vocab_size=ROWS, max_position_embeddings=16, projection_dim=32,
        bos_token_id=1, sep_token_id=2, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    model = apply_quant_noise(BlipTextModel(config), QuantNoiseConfig(p=0.5)).train()
    model(input_ids=IDS).last_hidden_state.square().mean().backward()
    assert model.embeddings.word_embeddings.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("straight_through", [False, True])
def test_output_of_skipped_layer_can_be_changed_in_place(straight_through):
    def gradients(hook):
        torch.manual_seed(0)
        model = make_stacked("bert", 4).train()
        config = QuantNoiseConfig(p=0.5, layerdrop=0.6, layerdrop_ste=straight_through)
        apply_quant_noise(model, config)
        for layer in model.base_model.encoder.layer:
            layer.register_forward_hook(hook)
        for _ in range(3):  # the first forwards are trials
            output = model(IDS, output_hidden_states=True)
        (output.logits.square().mean() + output.hidden_states[1].square().mean()).backward()
        return [parameter.grad for parameter in model.parameters()]

    changed = gradients(lambda layer, args, output: output.add_(1).mul_(2))
    expected = gradients(lambda layer, args, output: (output + 1) * 2)
    for one, other in zip(changed, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
