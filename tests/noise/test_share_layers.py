"""share_layers (section 7.9): one Parameter in training, normal checkpoints."""

import copy
import pickle

import pytest
import torch
from support.stacked import BY_PLACE, STACKED, inputs_of, make_stacked
from support.tiny import make_vision_model
from transformers import Trainer, TrainingArguments

from hf_quantnoise import (
    IPQConfig,
    QuantNoiseCallback,
    QuantNoiseConfig,
    QuantNoiseTrainer,
    apply_quant_noise,
    remove_quant_noise,
)
from hf_quantnoise.noise import find_state
from hf_quantnoise.sharing import chunks_of

NAMES = [*STACKED, *BY_PLACE]
NOISE = {"p": 0.3, "block_size": 4, "share_layers": 2}


def layer_pairs(model):
    return [
        (model.get_submodule(chunk[0]), model.get_submodule(name))
        for chunk in chunks_of(model, 2)
        for name in chunk[1:]
    ]


def is_shared(pair) -> bool:
    return pair[1].output.dense.weight is pair[0].output.dense.weight


@pytest.mark.parametrize("name", NAMES)
def test_chunks_share_parameters_until_removal(name):
    model = make_stacked(name, layers=4)
    original = dict(model.named_parameters(remove_duplicate=False))
    values = {key: parameter.detach().clone() for key, parameter in original.items()}
    keys = list(model.state_dict())
    apply_quant_noise(model, QuantNoiseConfig(**NOISE))
    for first, second in layer_pairs(model):
        ours, theirs = dict(first.named_parameters()), dict(second.named_parameters())
        assert ours.keys() & theirs.keys()
        for key in ours.keys() & theirs.keys():
            assert theirs[key] is ours[key]
            assert torch.equal(ours[key], values[_name_of(original, ours[key])])
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        expected = model(**inputs_of(name)).logits
    remove_quant_noise(model)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == original.keys()
    assert all(after[key] is original[key] for key in original)
    with torch.no_grad():
        assert torch.equal(model(**inputs_of(name)).logits, expected)
    tensors = [p.data_ptr() for layer in chunks_of(model, 1)
               for p in model.get_submodule(layer[0]).parameters()]  # fmt: skip
    assert len(set(tensors)) == len(tensors)  # not shared any more


def test_removal_separates_layers_of_parts_that_got_noise_one_by_one():
    model = make_stacked("t5", layers=4)
    original = dict(model.named_parameters(remove_duplicate=False))
    for part in (model.encoder, model.decoder):
        apply_quant_noise(part, QuantNoiseConfig(**NOISE))
    remove_quant_noise(model)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is original[name] for name in original)


def _name_of(parameters, wanted):
    return next(key for key, parameter in parameters.items() if parameter is wanted)


def test_gradient_is_the_sum_over_a_chunk():
    shared, apart = make_stacked("llama", layers=4), make_stacked("llama", layers=4)
    for first, second in layer_pairs(apart):
        second.load_state_dict(first.state_dict())
    apply_quant_noise(shared, QuantNoiseConfig(p=0.0, block_size=4, share_layers=2))
    for model in (shared, apart):
        model.train()(**inputs_of("llama")).logits.square().mean().backward()
    for (one, _), (first, second) in zip(layer_pairs(shared), layer_pairs(apart), strict=True):
        for key, parameter in one.named_parameters():
            total = first.get_parameter(key).grad + second.get_parameter(key).grad
            torch.testing.assert_close(parameter.grad, total)


def test_checkpoint_loads_without_the_package(tmp_path, run_python):
    model = apply_quant_noise(make_stacked("roberta-mlm", layers=4), QuantNoiseConfig(**NOISE))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        logits = model(**inputs_of("roberta-mlm")).logits
    torch.save((inputs_of("roberta-mlm"), logits), tmp_path / "expected.pt")
    run_python(
        "import sys, torch\n"
        "from transformers import AutoModelForMaskedLM\n"
        f"folder = {str(tmp_path)!r}\n"
        "model, info = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)\n"
        "assert not info['missing_keys'] and not info['unexpected_keys'], info\n"
        "inputs, expected = torch.load(folder + '/expected.pt')\n"
        "with torch.no_grad():\n"
        "    torch.testing.assert_close(model(**inputs).logits, expected)\n"
        "assert 'hf_quantnoise' not in sys.modules\n"
    )


def arguments(folder, **changes):
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 16, "num_train_epochs": 2,
        "learning_rate": 1e-3, "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        "save_steps": 4,
    }  # fmt: skip
    return TrainingArguments(**{**settings, **changes})


def test_training_resumes_bit_exactly_and_loads_the_best_model(tmp_path, parity_data):
    def trainer(folder, **changes):
        return QuantNoiseTrainer(
            make_stacked("bert", layers=4),
            arguments(folder, **changes),
            QuantNoiseConfig(**NOISE, layerdrop=0.2),
            train_dataset=parity_data,
            eval_dataset=parity_data,
        )

    straight = trainer(tmp_path / "a")
    straight.train()
    resumed = trainer(tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-8"))
    for name, parameter in straight.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name
    best = trainer(tmp_path / "c", load_best_model_at_end=True, eval_strategy="steps", eval_steps=4)
    best.train()
    assert all(map(is_shared, layer_pairs(best.model)))


def test_error_keeps_the_separate_weights():
    model = make_stacked("bert", layers=4)
    original = dict(model.named_parameters())
    values = {name: parameter.detach().clone() for name, parameter in original.items()}
    with pytest.raises(ValueError, match="block_size=7"):
        apply_quant_noise(model, QuantNoiseConfig(block_size=7, share_layers=2))
    after = dict(model.named_parameters())
    assert after.keys() == original.keys()
    for name, parameter in after.items():
        assert parameter is original[name]
        assert torch.equal(parameter, values[name])
    assert not any(module._state_dict_hooks for module in model.modules())


def test_copies_and_pickles_are_independent():
    model = apply_quant_noise(make_stacked("bert", layers=4), QuantNoiseConfig(**NOISE))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        pairs = layer_pairs(other)
        assert all(map(is_shared, pairs))
        remove_quant_noise(other)
        assert not any(map(is_shared, pairs))
        assert not any(module._state_dict_hooks for module in other.modules())
    assert all(
        one.output.dense.weight is two.output.dense.weight for one, two in layer_pairs(model)
    )
    assert find_state(model) is not None


def test_chunks_by_name_without_stacks():
    model = make_vision_model("mobilenet-v1")
    with pytest.raises(ValueError, match="share_layers=2"):
        chunks_of(model, 2)
    chunk = [f"mobilenet_v1.layer.{n}" for n in (14, 16, 18)]
    config = QuantNoiseConfig(p=0.1, block_size=1, share_layers=[chunk], noise="int8")
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    apply_quant_noise(model, config)
    weights = {id(model.get_submodule(name).convolution.weight) for name in chunk}
    assert len(weights) == 1
    for name, buffer in model.named_buffers():  # running means are not shared
        assert torch.equal(buffer, buffers[name])
    assert len({id(model.get_submodule(name).normalization.running_mean) for name in chunk}) == 3


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("layer.99", "layer.14"), "has no layer 'mobilenet_v1.layer.99'"),
        (("layer.1", "layer.14"), "cannot share the weights.*differ in"),
        (("layer.14", "conv_stem.convolution"), "differ in class"),
    ],
)
def test_chunks_of_different_layers_raise(names, message):
    chunk = [f"mobilenet_v1.{name}" for name in names]
    with pytest.raises(ValueError, match=message):
        chunks_of(make_vision_model("mobilenet-v1"), [chunk])


def test_chunks_are_cut_bottom_up_and_the_last_may_be_short():
    chunks = chunks_of(make_stacked("bart", layers=5), 2)
    encoder = [chunk for chunk in chunks if "encoder" in chunk[0]]
    assert [len(chunk) for chunk in encoder] == [2, 2, 1]
    assert encoder[1] == ("model.encoder.layers.2", "model.encoder.layers.3")
    assert len(chunks) == 6


def test_callback_must_be_prepared_before_the_trainer(tmp_path, parity_data):
    config = QuantNoiseConfig(**NOISE)
    model = make_stacked("bert", layers=4)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=parity_data)
    trainer.add_callback(QuantNoiseCallback(config))
    with pytest.raises(ValueError, match=r"share_layers=2.*\.prepare"):
        trainer.train()
    callback = QuantNoiseCallback(config)
    callback.prepare(model)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=parity_data, callbacks=[callback])
    trainer.train()
    assert all(
        one.output.dense.weight is two.output.dense.weight for one, two in layer_pairs(model)
    )


def test_matching_copies_share_layers():
    assert QuantNoiseConfig.matching(IPQConfig(share_layers=3)).share_layers == 3
    assert QuantNoiseConfig.matching(IPQConfig()).share_layers == 1
