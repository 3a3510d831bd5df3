"""LayerDrop on stacks of many architectures (sections 4.2 and 7.9, table 11)."""

import copy
import pickle

import pytest
import torch
from support.stacked import STACKED, inputs_of
from support.stacked import make_stacked as make
from support.tiny import SIZES, make_vision_model, recompute
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    Wav2Vec2ConformerConfig,
    Wav2Vec2ConformerModel,
)

from hf_quantnoise import QuantNoiseConfig, apply_quant_noise, remove_quant_noise
from hf_quantnoise.noise import find_state
from hf_quantnoise.noise.layerdrop import SkipPlan
from hf_quantnoise.structure import find_stacks

NAMES = list(STACKED)


def dropping(model: nn.Module, rate: float, **fields) -> nn.Module:
    """LayerDrop alone: the noise on weights has a rate of 0."""
    config = QuantNoiseConfig(p=0.0, block_size=4, layerdrop=rate, **fields)
    return apply_quant_noise(model, config)


class PassOn(nn.Module):
    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states, None


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [model.get_submodule(name) for stack in find_stacks(model) for name in stack]


def quiet(model: nn.Module) -> nn.Module:
    """Training mode without functional dropout."""
    model.train()
    for module in model.modules():
        for attribute in ("dropout", "attention_dropout", "activation_dropout", "dropout_prob"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_rate_1_matches_a_model_without_the_layers(name):
    model, shorter = make(name), make(name)
    drop = dropping(model, 1e-9)
    quiet(drop)(**inputs_of(name))  # sets the plan of each layer
    find_state(drop).layerdrop.rate = 1.0
    skippable = [
        name for name in (n for stack in find_stacks(model) for n in stack)
        if not isinstance(model.get_submodule(name)._layer_drop.plan, str)
    ]  # fmt: skip
    total = len(layers_of(model))
    # T5's first blocks create the position bias that all others read.
    assert len(skippable) == (total - 2 if name == "t5" else total)
    for path in reversed(skippable):
        stack, _, number = path.rpartition(".")
        if name == "deberta":  # fails without layers
            shorter.get_submodule(stack)[int(number)] = PassOn()
        else:
            del shorter.get_submodule(stack)[int(number)]
    with torch.no_grad():
        expected = quiet(shorter)(**inputs_of(name)).logits
        result = quiet(drop)(**inputs_of(name)).logits
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_eval_keys_classes_and_removal(name):
    model, untouched = make(name), make(name)
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    drop = dropping(model, 0.5)
    with torch.no_grad():
        assert torch.equal(drop.eval()(**inputs_of(name)).logits,
                           untouched(**inputs_of(name)).logits)  # fmt: skip
    assert list(drop.state_dict()) == keys
    for module, cls in zip(drop.modules(), classes, strict=True):
        assert isinstance(module, cls)
    remove_quant_noise(drop)
    assert [type(module) for module in drop.modules()] == classes
    assert not any("_layer_drop" in key for module in drop.modules() for key in module.__dict__)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite(name):
    model = dropping(make(name), 0.5)
    torch.manual_seed(3)
    for _ in range(4):
        output = model.train()(**inputs_of(name))
        output.logits.float().square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads and all(torch.isfinite(grad).all() for grad in grads)


def test_each_layer_is_skipped_at_the_rate():
    model = dropping(make("bert"), 0.3).train()
    model(**inputs_of("bert"))
    rounds, ran = 300, [0, 0, 0]
    for number, layer in enumerate(layers_of(model)):

        def count(module, args, kwargs, number=number):
            ran[number] += 1

        layer.attention.register_forward_pre_hook(count, with_kwargs=True)
    with torch.no_grad():
        for _ in range(rounds):
            model(**inputs_of("bert"))
    for count in ran:
        assert abs(count / rounds - 0.7) < 5 * (0.3 * 0.7 / rounds) ** 0.5


def test_skipped_layer_gets_gradients_with_layerdrop_ste_only():
    grads = {}
    for straight in (False, True):
        model = dropping(make("gpt2"), 1e-9, layerdrop_ste=straight)
        quiet(model)(**inputs_of("gpt2"))
        find_state(model).layerdrop.rate = 1.0
        output = model(**inputs_of("gpt2")).logits
        output.square().mean().backward()
        grads[straight] = (output.detach(), [p.grad for p in layers_of(model)[0].parameters()])
    assert torch.equal(grads[False][0], grads[True][0])
    assert all(grad is None for grad in grads[False][1])
    assert all(grad is not None for grad in grads[True][1])
    assert sum(float(grad.abs().sum()) for grad in grads[True][1]) > 0


def test_recomputation_skips_the_same_layers():
    results = []
    for checkpointing in (False, True):
        model = dropping(make("llama"), 0.5)
        quiet(model)(**inputs_of("llama"))
        if checkpointing:
            recompute(model, use_reentrant=False)
        torch.manual_seed(11)
        model(**inputs_of("llama"), use_cache=False).logits.square().mean().backward()
        results.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    for one, other in zip(*results, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["bloom", "llama", "t5", "gpt2"])
def test_recomputation_of_a_first_forward_skips_the_same_layers(name, use_reentrant):
    """Layers that create tensors run in their first forward, even if a skip is sampled."""
    for seed in range(4):
        results = []
        for checkpointing in (False, True):
            model = quiet(dropping(make(name), 0.5))
            if checkpointing:
                recompute(model, use_reentrant=use_reentrant)
            torch.manual_seed(seed)
            # The second forward may skip the layers that the first one has to run.
            outputs = [model(**inputs_of(name), use_cache=False).logits for _ in range(2)]
            sum(output.square().mean() for output in outputs).backward()
            results.append([p.grad for p in model.parameters()])
        for one, other in zip(*results, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other)


def test_cache_in_training_and_generation_after_it(input_ids):
    model = dropping(make("gpt2"), 0.5).train()
    for _ in range(5):
        assert model(input_ids, use_cache=True).past_key_values is not None
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = make("gpt2").generate(input_ids, **options)
    assert torch.equal(model.eval().generate(input_ids, **options), expected)


def test_copies_and_pickles():
    model = dropping(make("bert"), 0.4)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.manual_seed(0)
        one = model.train()(**inputs_of("bert")).logits
        torch.manual_seed(0)
        assert torch.equal(other.train()(**inputs_of("bert")).logits, one)


def test_models_without_a_stack_raise_unchanged():
    albert = AlbertForMaskedLM(AlbertConfig(**SIZES, embedding_size=16))
    for model in (make_vision_model("resnet"), albert):
        classes = [type(module) for module in model.modules()]
        with pytest.raises(ValueError, match=r"layerdrop=0.2 needs a stack"):
            apply_quant_noise(model, QuantNoiseConfig(block_size=1, layerdrop=0.2))
        assert [type(module) for module in model.modules()] == classes
    with pytest.raises(ValueError, match=r"layerdrop.*1.5"):
        QuantNoiseConfig(layerdrop=1.5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_of_a_chunk_are_skipped_together(checkpointing):
    model = dropping(make("llama", layers=4), 0.5, share_layers=2)
    quiet(model)(**inputs_of("llama"))
    if checkpointing:
        recompute(model, use_reentrant=False)
    ran: list[int] = []
    for number, layer in enumerate(layers_of(model)):
        layer.self_attn.register_forward_pre_hook(
            lambda *_, number=number: ran.append(number), with_kwargs=True
        )
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        ran.clear()
        loss = model(**inputs_of("llama"), use_cache=False).logits.square().mean()
        forward = sorted(ran)
        ran.clear()
        if loss.requires_grad:
            loss.backward()
        assert forward in ([], [0, 1], [2, 3], [0, 1, 2, 3])
        assert sorted(ran) == (forward if checkpointing else [])  # recomputed
        seen.add(tuple(forward))
    assert len(seen) > 2


def test_trial_forward_leaves_statistics_unchanged():
    """A layer that is skipped in its first forward has not run: no BatchNorm, range or noise."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    config = Wav2Vec2ConformerConfig(
        **sizes, num_hidden_layers=2, conv_dim=(8,), conv_stride=(4,), conv_kernel=(4,),
        num_feat_extract_layers=1, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        conv_depthwise_kernel_size=3, mask_time_prob=0.0, layerdrop=0.0,
    )  # fmt: skip
    model, fields = Wav2Vec2ConformerModel(config), {"activation_bits": 8, "layerdrop": 1 - 1e-9}
    apply_quant_noise(model, QuantNoiseConfig(noise="int8", p=0.5, **fields)).train()
    statistics = {name: buffer.clone() for name, buffer in model.encoder.layers.named_buffers()}
    assert any(name.endswith("running_var") for name in statistics)
    model(torch.randn(2, 80))
    for name, buffer in model.encoder.layers.named_buffers():
        assert torch.equal(buffer, statistics[name]), name
    state = find_state(model)
    assert all(isinstance(layer._layer_drop.plan, SkipPlan) for layer in layers_of(model))
    inside = {name: each for name, each in state.activations.items() if ".layers." in name}
    assert inside and not any(noise.seen for noise in inside.values())
    weights = [weight for weight in state.weights if weight.names[0] in inside]
    assert not any(weight.noise.used for weight in weights)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("name", NAMES)
def test_first_forward_skips_like_later_ones(name):
    """Otherwise a resumed run would differ from an uninterrupted one in its first step."""
    if name in ("t5", "bloom"):
        pytest.skip("its layers create tensors that others may read, known only after a forward")
    fresh, used = dropping(make(name), 0.5), dropping(make(name), 0.5)
    with torch.no_grad():
        quiet(used)(**inputs_of(name))
        for seed in range(4):
            torch.manual_seed(seed)
            expected = used(**inputs_of(name)).logits
            torch.manual_seed(seed)
            first = quiet(copy.deepcopy(fresh))(**inputs_of(name)).logits
            assert torch.equal(first, expected)
