"""Models with hooks of accelerate (``device_map``), whose layers change their class."""

import copy

import pytest
import torch
from accelerate.hooks import (
    AlignDevicesHook,
    add_hook_to_module,
    attach_align_device_hook,
    remove_hook_from_module,
)
from support.loaded import output
from support.stacked import inputs_of, make_stacked
from support.stored import PQ
from support.tiny import make_model
from torch import nn

from hf_quantnoise import (
    AutoQuantizedModel,
    FixedPointConfig,
    IPQConfig,
    QuantNoiseConfig,
    apply_quant_noise,
    quantize_model,
    remove_quant_noise,
)
from hf_quantnoise.compat import bind_hooked_forward

INPUTS = {"input_ids": inputs_of("bert")["input_ids"]}


def hooked(model):
    attach_align_device_hook(model, execution_device="cpu")
    return model


def unhooked(model):
    """Return the model after its hooks were removed, which leaves their forwards."""
    return remove_hook_from_module(hooked(model), recurse=True)


WAYS = {"with hooks": hooked, "after hooks": unhooked, "copy": lambda m: copy.deepcopy(hooked(m))}


def test_bind_hooked_forward_follows_the_class():
    class Twice(nn.Linear):
        def forward(self, inputs):
            return 2 * super().forward(inputs)

    inputs = torch.ones(1, 2)
    for remove in (False, True):
        layer = nn.Linear(2, 2)
        expected = 2 * layer(inputs)
        attach_align_device_hook(layer, execution_device="cpu")
        assert layer._old_forward.__func__ is nn.Linear.forward
        if remove:
            remove_hook_from_module(layer)
        layer.__class__ = Twice
        bind_hooked_forward(layer, nn.Linear)
        assert torch.equal(layer(inputs), expected)


@pytest.mark.parametrize("way", WAYS)
def test_dequantized_layers_run_their_own_forward(way):
    model = quantize_model(make_model("bert"), IPQConfig(**PQ), progress=False)
    expected = output(copy.deepcopy(model).dequantize(), INPUTS)
    assert torch.equal(output(WAYS[way](model).dequantize(), INPUTS), expected)


@pytest.mark.parametrize("way", WAYS)
def test_packed_layers_round_their_inputs(way, tmp_path):
    config = FixedPointConfig(bits=8, activation_bits=2)
    model = WAYS[way](make_model("bert"))
    model = quantize_model(model, config, calibration_data=[INPUTS], progress=False)
    found = output(model, INPUTS)
    model.save_pretrained(tmp_path)
    assert torch.equal(found, output(AutoQuantizedModel.from_pretrained(tmp_path), INPUTS))


def test_packed_tables_with_hooks_decode_looked_up_rows(monkeypatch):
    model = quantize_model(hooked(make_model("bert")), IPQConfig(**PQ), progress=False)
    table = model.bert.embeddings.word_embeddings
    seen, original = [], type(table).decode_rows
    monkeypatch.setattr(
        type(table),
        "decode_rows",
        lambda self, rows=None: (
            seen.append(None if rows is None else len(rows)) or original(self, rows)
        ),
    )
    with torch.no_grad():
        table(torch.tensor([[4, 5, 4]]))
    assert seen == [3]


def test_forward_that_a_user_replaced_is_kept():
    model = make_model("bert")
    layer = model.classifier
    layer.forward = lambda inputs: nn.Linear.forward(layer, inputs) + 1
    dense = output(model, INPUTS)
    hooked(model)
    config = FixedPointConfig(bits=8, exclude_modules="bert.*")
    model = quantize_model(model, config, progress=False)
    torch.testing.assert_close(output(model, INPUTS), dense, rtol=0, atol=0.1)


def test_layerdrop_skips_blocks_with_hooks():
    model = make_stacked("bert", 2)
    for block in model.bert.encoder.layer:  # as device_map does with several devices
        add_hook_to_module(block, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    dense = output(model, INPUTS)
    config = QuantNoiseConfig(p=0.0, block_size=4, layerdrop=1.0)
    apply_quant_noise(model, config).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        assert not torch.allclose(model(**INPUTS).logits, dense)
    remove_quant_noise(model)
    assert torch.equal(output(model, INPUTS), dense)


def test_hooks_of_a_noisy_layer_outlive_its_noise():
    model = apply_quant_noise(make_model("bert"), QuantNoiseConfig(p=0.5, block_size=4))
    expected = output(model, INPUTS)
    assert torch.equal(output(remove_quant_noise(hooked(model)), INPUTS), expected)


def test_dequantizing_offloaded_layers_raises(tmp_path):
    model = quantize_model(make_model("bert"), IPQConfig(**PQ), progress=False)
    model.save_pretrained(tmp_path / "model")
    places = {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "cpu",
              "classifier": "cpu"}  # fmt: skip
    model = AutoQuantizedModel.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    expected = output(model, INPUTS)
    with pytest.raises(ValueError, match=r"device_map: bert.encoder.*offloaded.*dequantized"):
        model.dequantize()
    assert torch.equal(output(model, INPUTS), expected)  # unchanged
