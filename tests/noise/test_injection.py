"""apply_quant_noise and remove_quant_noise: effects and invariants."""

import copy
import io
import pickle

import pytest
import torch
from support.toy import IDS, Toy, noisy_toy
from torch import nn
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

from hf_quantnoise import QuantNoiseConfig, apply_quant_noise, remove_quant_noise
from hf_quantnoise.noise import find_state, is_noisy


def test_apply_and_remove_keep_objects_and_keys():
    model = Toy().train()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    classes = {name: type(module) for name, module in modules.items()}
    keys = list(model.state_dict())
    assert apply_quant_noise(model, QuantNoiseConfig(noise=["pq", "int8"], n_centroids=16)) is model
    assert list(model.state_dict()) == keys
    assert dict(model.named_buffers()) == {}
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in parameters.items())
    for name, module in model.named_modules():
        assert module is modules[name] and isinstance(module, classes[name])
    assert is_noisy(model.up) and type(model) is Toy

    assert remove_quant_noise(model) is model
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert all(model.get_parameter(name) is p for name, p in parameters.items())
    assert model.__dict__.keys() == Toy().__dict__.keys()
    assert model.up.__dict__.keys() == nn.Linear(1, 1).__dict__.keys()
    assert find_state(model) is None


def test_remove_without_noise_does_nothing():
    model = Toy()
    assert remove_quant_noise(remove_quant_noise(model)) is model


def test_state_lists_noised_and_skipped_layers():
    state = find_state(noisy_toy())
    assert list(state.layers) == ["words", "head", "up", "down"]
    assert list(state.left_clean) == ["positions"]
    assert "target_modules" in state.left_clean["positions"]
    assert state.p == (0.3,)
    assert "4 layers, 1 skipped" in repr(state)


def test_target_modules_and_exclude_modules():
    assert "positions" in find_state(noisy_toy(target_modules=["positions"])).layers
    assert list(find_state(noisy_toy(target_modules="up|down")).layers) == ["up", "down"]
    assert "up" not in find_state(noisy_toy(exclude_modules=["up"])).layers


@pytest.mark.parametrize("noise", ["proxy", "pq", "int8", ["pq", "int4"]])
def test_noise_is_active_in_training_only(noise):
    model, dense = noisy_toy(noise), Toy()
    assert not torch.equal(model(IDS), dense(IDS))
    assert not torch.equal(model(IDS), model(IDS))
    assert torch.equal(model.eval()(IDS), dense(IDS))
    find_state(model.train()).p = 0
    assert torch.equal(model(IDS), dense(IDS))
    assert "weight" not in model.up.__dict__


def test_p_can_be_set_and_is_checked():
    model = noisy_toy(["proxy", "int8"], [0.1, 0.2])
    state = find_state(model)
    state.p = 0.5
    assert state.p == (0.5, 0.5)
    state.p = [0.0, 1.0]
    assert state.p == (0.0, 1.0)
    for wrong in (1.5, [0.1], [0.1, -1]):
        with pytest.raises(ValueError, match=r"invalid p.*0 to 1.*2 noises"):
            state.p = wrong
    assert state.p == (0.0, 1.0)


def test_tied_pair_has_one_mask():
    model = noisy_toy("proxy", 0.5)
    zero_rows = []
    model.words.register_forward_hook(lambda m, inputs, out: zero_rows.append(out))
    every_id = torch.arange(60)
    for ids in (every_id[:8], every_id):  # some rows; the complete table
        looked_up = model.words(ids)
        head = model.head(torch.eye(32)).t()  # the matrix that the head used
        assert torch.equal(looked_up == 0, head[ids] == 0)
    assert 0.3 < float((looked_up == 0).float().mean()) < 0.7


def test_padding_row_gets_noise_and_no_gradient():
    model = apply_quant_noise(Toy(padding_idx=1).train(), QuantNoiseConfig(p=1.0))
    model.words(IDS).sum().backward()
    assert (model.words(IDS) == 0).all()
    assert (model.words.weight.grad[1] == 0).all() and (model.words.weight.grad[5] == 1).all()


@pytest.mark.parametrize("arguments", [{"scale_grad_by_freq": True}, {"sparse": True}])
def test_embedding_arguments_still_apply(arguments):
    model, dense = Toy(**arguments).train(), Toy(**arguments)
    del model.head, dense.head
    apply_quant_noise(model, QuantNoiseConfig(p=0.4))
    dy = torch.randn(2, 4, 32)
    model.words(IDS).backward(dy)
    dense.words(IDS).backward(dy)
    gradient, expected = model.words.weight.grad, dense.words.weight.grad
    assert gradient.is_sparse == expected.is_sparse
    assert torch.equal(gradient.to_dense(), expected.to_dense())


def test_max_norm_shrinks_the_parameter():
    model, dense = Toy(max_norm=1.0).train(), Toy(max_norm=1.0)
    apply_quant_noise(model, QuantNoiseConfig(p=0.4))
    ids = torch.arange(60).repeat(2)
    model.words(ids), dense.words(ids)
    assert torch.equal(model.words.weight, dense.words.weight)
    assert float(dense.words.weight.detach().norm(dim=1).max()) < 1.001


def test_embedding_subclass_keeps_its_forward():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = OPTLearnedPositionalEmbedding(30, 32)

    model = Model().train()
    table = model.positions.weight.detach().clone()
    mask = torch.ones(2, 5, dtype=torch.long)
    dense = model.positions(mask, 0)
    apply_quant_noise(model, QuantNoiseConfig(p=0.5, target_modules=["positions"]))
    noisy = model.positions(mask, 0)
    assert torch.equal(dense[0], table[2:7])  # the offset of 2
    kept = noisy != 0
    assert torch.equal(noisy[kept], dense[kept]) and 0.2 < kept.float().mean() < 0.8


def test_weights_are_unchanged_after_forwards_and_an_error():
    model = noisy_toy(["pq", "proxy", "int8"], 0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(20):
        model(IDS)
    with pytest.raises(RuntimeError):
        model.up(torch.zeros(3, 5))
    assert "weight" not in model.up.__dict__
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copy_has_independent_noise(copier):
    model = noisy_toy(["pq", "int8"], 0.5)
    twin = copier(model)
    assert type(twin.up) is type(model.up)
    assert find_state(twin).layers["head"] is twin.head
    assert twin.head.weight is twin.words.weight and twin.up.weight is not model.up.weight
    torch.manual_seed(0)
    expected = model(IDS)
    torch.manual_seed(0)
    assert torch.equal(twin(IDS), expected)
    find_state(twin).p = 0
    assert find_state(model).p == (0.5, 0.5)
    assert torch.equal(twin(IDS), remove_quant_noise(twin)(IDS))
    assert is_noisy(model.up) and not is_noisy(twin.up)
    words = twin.words(torch.arange(60))
    assert torch.equal(words, twin.words.weight)


def test_copied_layer_does_not_reference_the_model():
    model = noisy_toy("pq")
    size = len(pickle.dumps(copy.deepcopy(model.down)))
    assert size < 3 * model.down.weight.numel() * 4


def test_find_state_through_wrappers_and_torch_save():
    class Wrapper(nn.Module):
        def __init__(self, module) -> None:
            super().__init__()
            self.module = module

    model = noisy_toy()
    assert find_state(Wrapper(model)) is find_state(model)
    assert find_state(torch.compile(model, backend="eager")) is find_state(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert is_noisy(torch.load(file, weights_only=False).up)
    remove_quant_noise(Wrapper(model))
    assert not is_noisy(model.up) and find_state(model) is None


@pytest.mark.parametrize("noise", ["proxy", "pq", "mean", ["pq", "int8"]])
def test_state_round_trip_reproduces_the_noise(noise):
    model, other = noisy_toy(noise), Toy().train()
    nn.init.normal_(other.up.weight)
    apply_quant_noise(other, QuantNoiseConfig(noise=noise, p=0.3, n_centroids=16, seed=7))
    other.load_state_dict(model.state_dict())
    find_state(other).load_state_dict(find_state(model).state_dict())
    torch.manual_seed(0)
    expected = model(IDS)
    torch.manual_seed(0)
    assert torch.equal(other(IDS), expected)


def test_load_state_dict_rejects_another_noise():
    state = find_state(noisy_toy("pq"))
    before = state.state_dict()
    with pytest.raises(ValueError, match=r"another noise or model.*down\.0\.codebook"):
        state.load_state_dict(find_state(noisy_toy("int8")).state_dict())
    wrong = {**before, "down.0.codebook": torch.zeros(3, 8)}
    with pytest.raises(ValueError, match=r"down.0.codebook: got \(3, 8\), expected \(16, 8\)"):
        state.load_state_dict({**wrong, "words.0.codebook": torch.zeros(16, 8)})
    assert all(torch.equal(tensor, before[key]) for key, tensor in state.state_dict().items())


def test_refresh_codebooks_and_refresh_scales_are_separate():
    model = noisy_toy(["pq", "int8"])
    state = find_state(model)

    def changed(refresh) -> set[str]:
        before = {key: tensor.clone() for key, tensor in state.state_dict().items()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        refresh()
        after = state.state_dict()
        return {key.rpartition(".")[2] for key in after if not torch.equal(after[key], before[key])}

    assert changed(state.refresh_codebooks) <= {"codebook", "codes"}
    assert "scale" in changed(state.refresh_scales)
    assert "codebook" not in changed(state.refresh_scales)


def test_codebooks_follow_the_model_to_a_device():
    """model.to(device) does not move them, as they are not buffers; "meta" represents a GPU."""
    for weight in find_state(noisy_toy(["pq", "int8"])).weights:
        for _, function in weight.noise.functions:
            moved = function._state_on(torch.device("meta"))
            assert moved and all(tensor.is_meta for tensor in moved.values())
            assert moved is function.state


@pytest.mark.parametrize("ids", [torch.empty(0, dtype=torch.long), IDS.int(), torch.tensor(3)])
def test_lookup_of_any_shape_and_integer_type(ids):
    model = noisy_toy("pq", 0.5)
    assert model.words(ids).shape == (*ids.shape, 32)


@pytest.mark.parametrize(
    ("noise", "backend"), [("proxy", "aot_eager"), ("pq", "eager"), ("int8", "eager")]
)
def test_untied_layers_compile_without_a_graph_break(noise, backend):
    model = noisy_toy(noise, 1.0, target_modules=["up", "down"])
    torch._dynamo.reset()
    compiled = torch.compile(nn.Sequential(model.up, model.down), fullgraph=True, backend=backend)
    x = torch.randn(4, 32)
    assert torch.equal(compiled(x), model.down(model.up(x)))
    find_state(model).p = 0.5
    compiled(x).sum().backward()
    assert not torch.equal(compiled(x), compiled(x))
    assert model.up.weight.grad.norm() > 0


def test_tied_layers_compile_too():
    """With a graph break each, which must not lose the noise."""
    model = noisy_toy("int4", 0.5)
    torch._dynamo.reset()
    words, head = (torch.compile(part, backend="eager") for part in (model.words, model.head))
    looked_up, used = words(torch.arange(60)), head(torch.eye(32)).t()
    assert not torch.equal(looked_up, model.words.weight)
    assert torch.equal(looked_up, used)
