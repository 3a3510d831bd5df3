"""Checks each private name of other libraries against the installed versions."""

import ast
import copy
import importlib
import inspect
import pickle
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, cpu_offload
from accelerate.state import AcceleratorState
from packaging.version import Version
from support.tiny import make_model
from test_dependencies import pins
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    RwkvConfig,
    RwkvModel,
    Trainer,
    TrainingArguments,
)
from transformers.quantizers import HfQuantizer

import hf_quantnoise
from hf_quantnoise import compat
from hf_quantnoise.compat import products
from hf_quantnoise.compat.torch_func import in_torch_func

ROOT = Path(hf_quantnoise.__file__).parent
# Private by their name, but documented (namedtuple) or without a public counterpart (argparse).
STANDARD_LIBRARY = {"_actions", "_asdict", "_option_string_actions", "_replace", "_subparsers"}

CLASSES = {
    "torch.nn.Module": nn.Module,
    "transformers.Trainer": Trainer,
    "transformers.quantizers.HfQuantizer": HfQuantizer,
}


@pytest.fixture(scope="module")
def bert():
    return make_model("bert")


@pytest.mark.parametrize("name", compat.SEEN_IN)
def test_seen_in_is_what_is_tested(name):
    tested = (pins("constraints-oldest.txt")[name], pins("constraints.txt")[name])
    assert tuple(map(Version, compat.SEEN_IN[name])) == tested


@pytest.mark.parametrize(
    ("owner", "method"),
    [(owner, method) for owner, methods in compat.OVERRIDDEN.items() for method in methods],
)
def test_overridden_method_has_expected_parameters(owner, method):
    assert hasattr(CLASSES[owner], method), f"{owner}.{method} is gone"
    parameters = list(inspect.signature(getattr(CLASSES[owner], method)).parameters)
    assert parameters == ["self", *compat.OVERRIDDEN[owner][method]]


# ---- torch ---------------------------------------------------------------------------------------


def test_disabled_torch_function_keeps_subclass_plain():
    class Plain(torch.Tensor):
        __torch_function__ = compat.disabled_torch_function

    assert type(torch.ones(2).as_subclass(Plain) + 1) is torch.Tensor


def test_disable_torch_function_skips_device_context():
    with torch.device("meta"), compat.DisableTorchFunction():
        assert torch.ones(1).device.type == "cpu"


def test_int8_product_is_exact_in_int32():
    extremes = torch.tensor([-128, 127], dtype=torch.int8)
    for n_inputs in (1, 3, 17):
        inputs = extremes[torch.randint(2, (n_inputs, 3072))]
        weight = extremes[torch.randint(2, (40, 3072))]
        found = products.int8_product(inputs, weight)
        assert found.dtype == torch.int32
        assert torch.equal(found.long(), inputs.long() @ weight.long().t())
    assert isinstance(products.has_int8_products(), bool)
    for device in ("cpu", "cuda", "mps"):
        assert isinstance(products.has_bf16_products(torch.device(device)), bool)


@pytest.mark.skipif(not products.has_int8_products(), reason="no int8 instructions")
def test_prepacked_int8_survives_copies_and_saturates_nowhere():
    weight, bias = torch.randn(24, 4096).sign() * 3, torch.randn(24)
    inputs = torch.randn(5, 4096).sign() * 2
    expected = torch.nn.functional.linear(inputs, weight, bias)
    packed = products.prepacked_int8(weight, bias)
    for each in (packed, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        found = products.dynamic_int8_linear(inputs, each)
        assert float((found - expected).abs().max()) < 4096 * 6 * 0.01


def test_in_backward():
    seen = []
    tensor = torch.ones(1, requires_grad=True)
    tensor.register_hook(lambda grad: seen.append(compat.in_backward()))
    tensor.sum().backward()
    assert seen == [True] and not compat.in_backward()


def test_own_parameters_and_buffers_are_the_modules():
    module = nn.BatchNorm1d(2)
    module.register_buffer("scratch", torch.ones(1), persistent=False)
    compat.own_parameters(module)["weight"] = other = nn.Parameter(torch.zeros(2))
    compat.own_buffers(module)["running_mean"] = mean = torch.full((2,), 3.0)
    assert module.weight is other and module.running_mean is mean
    assert compat.persistent_buffer_names(module) == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }


def test_conv_padding_is_in_the_order_of_pad():
    assert list(compat.conv_padding(nn.Conv2d(1, 1, 3, padding=(1, 2)))) == [2, 2, 1, 1]


def test_without_compile_wrapper():
    layer = nn.Linear(2, 2)
    assert compat.without_compile_wrapper(torch.compile(layer)) is layer
    assert compat.without_compile_wrapper(layer) is layer


# ---- accelerate ----------------------------------------------------------------------------------


def test_undo_accelerate_prepare():
    AcceleratorState._reset_state(True)  # an earlier test may have chosen another precision
    layer = nn.Linear(2, 2)
    before = dict(vars(layer))
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare(layer)
    assert vars(prepared).keys() - before.keys() >= {"_is_accelerate_prepared", "forward"}
    compat.undo_accelerate_prepare(prepared)
    assert vars(prepared).keys() == before.keys()
    assert prepared(torch.ones(1, 2)).dtype == torch.float32
    AcceleratorState._reset_state(True)


def test_offloaded_names():
    (layer,) = cpu_offload(nn.Sequential(nn.Linear(2, 2)), execution_device=torch.device("cpu"))
    assert layer.weight.is_meta
    assert compat.offloaded_names(layer) == {"weight", "bias"}


# ---- transformers --------------------------------------------------------------------------------


def test_ignored_keys_can_be_added_to(tmp_path, bert):
    bert.save_pretrained(tmp_path)

    class Lenient(type(bert)):
        def __init__(self, config):
            super().__init__(config)
            self.extra = nn.Linear(1, 1)
            compat.ignored_if_missing(self).add("extra")

    _, info = Lenient.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    for ignored in (compat.ignored_if_missing, compat.ignored_if_unexpected):
        assert isinstance(ignored(bert), set)


def test_ignored_on_save(bert):
    assert compat.ignored_on_save(bert) == set()
    bert._keys_to_ignore_on_save = ["a"]
    try:
        assert compat.ignored_on_save(bert) == {"a"}
    finally:
        del bert._keys_to_ignore_on_save


def test_loaded_model_has_conversions_and_initialized_tensors(tmp_path, bert):
    bert.save_pretrained(tmp_path)
    loaded = type(bert).from_pretrained(tmp_path)
    assert isinstance(loaded._weight_conversions, list)
    assert isinstance(compat.weight_conversions(loaded), list)
    compat.set_weight_conversions(loaded, [compat.WeightRenaming("a", "b")])
    assert compat.weight_conversions_on_save(loaded) == compat.weight_conversions(loaded) != []
    assert compat.weight_conversions_on_save(bert) == []
    assert compat.dtype_plan(loaded, torch.float16) == {}


def test_mark_initialized_keeps_values():
    model = make_model("bert")
    layer = model.get_submodule(next(n for n, m in model.named_modules() if type(m) is nn.Linear))
    nn.init.constant_(layer.weight, 7.0)
    compat.mark_initialized(layer)
    compat.mark_initialized(layer.weight)
    assert compat.is_initialized(layer) and compat.is_initialized(layer.weight)
    model.init_weights()
    assert bool((layer.weight == 7.0).all())


def test_model_attributes(bert):
    made = compat.from_config(type(bert), bert.config, dtype=torch.float16)
    assert type(made) is type(bert) and made.dtype == torch.float16
    assert "module" in inspect.getsource(compat.init_weights_function(bert))
    assert "BertLayer" in compat.classes_kept_together(bert)
    assert isinstance(getattr(type(bert), compat.TIED_WEIGHTS, {}), dict | None)
    assert compat.has_adapter(bert) is False
    assert compat.models_of(AutoModelForSequenceClassification)[type(bert.config)] is type(bert)


def test_config_attributes(bert):
    compat.mark_quantized(bert.config, True)
    assert bert.config._is_quantized
    compat.mark_quantized(bert.config, False)
    name = compat.attention_implementation(bert.config)
    bert.set_attn_implementation("eager")
    assert compat.attention_implementation(bert.config) == "eager"
    compat.set_attention_implementation(bert.config, name)
    assert compat.attention_implementation(bert.config) == name


def test_trainer_methods(tmp_path, bert):
    trainer = Trainer(bert, TrainingArguments(tmp_path, report_to="none", use_cpu=True))
    batch = {"input_ids": torch.ones(1, 2, dtype=torch.long)}
    assert compat.prepare_inputs(trainer, batch).keys() == batch.keys()
    compat.finish_current_push(trainer)


# ---- peft ----------------------------------------------------------------------------------------


def test_set_table_of_prompts():
    """It replaces a method that peft still has, once, and also before peft is imported."""
    importlib.import_module("hf_quantnoise.trainer")  # imports what replaces it
    peft_model = pytest.importorskip("peft.peft_model", reason="peft is not installed")
    setup = peft_model.PeftModel._setup_prompt_encoder
    assert inspect.signature(setup.__wrapped__).parameters.keys() == {"self", "adapter_name"}
    assert not hasattr(setup.__wrapped__, "__wrapped__")
    assert 'get_submodule("embeddings.word_embeddings")' in inspect.getsource(setup.__wrapped__)


def test_stop_rescaling():
    settings = {"hidden_size": 8, "attention_hidden_size": 8, "intermediate_size": 8}
    model = RwkvModel(RwkvConfig(vocab_size=8, num_hidden_layers=2, rescale_every=1, **settings))
    weight = model.blocks[1].attention.output.weight
    before = weight.detach().clone()
    model.eval()(torch.ones(1, 2, dtype=torch.long))
    assert torch.equal(weight, before / 2)
    compat.stop_rescaling(model)
    assert torch.equal(weight, before) and not model.training
    model(torch.ones(1, 2, dtype=torch.long))
    assert torch.equal(weight, before)


# ---- no other file -------------------------------------------------------------------------------


def private_attributes(tree):
    """Yield (holder, name, line) of each `holder.name`, `getattr(holder, "name")` and the like."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node.value), node.attr, node.lineno
        elif isinstance(node, ast.Call) and len(node.args) > 1:
            holder, name = node.args[:2]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield ast.unparse(holder), name.value, node.lineno


def defined_names(tree):
    """Yield the names of functions, classes and variables, and of attributes that are assigned."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def test_no_other_file_uses_private_names():
    trees = {
        path.relative_to(ROOT).as_posix(): ast.parse(path.read_text())
        for path in ROOT.rglob("*.py")
    }
    here = [trees.pop(name) for name in list(trees) if name.startswith("compat/")]
    own = {name for tree in trees.values() for name in defined_names(tree)}
    foreign = {name for tree in here for _, name, _ in private_attributes(tree)}
    overridden = {name for methods in compat.OVERRIDDEN.values() for name in methods}
    found = [
        f"{file}:{line}: {holder}.{name}"
        for file, tree in trees.items()
        for holder, name, line in private_attributes(tree)
        if name.startswith("_") and not name.startswith("__") and name not in STANDARD_LIBRARY
        if name in foreign or name not in own
        if not (holder == "super()" and name in overridden)
    ]
    assert not found, "move these to compat/:\n" + "\n".join(found)


def test_in_torch_func_knows_transformations():
    found = []

    def function(values):
        found.append(in_torch_func())
        return values

    function(torch.ones(2))
    torch.vmap(function)(torch.ones(2))
    torch.func.jvp(function, (torch.ones(2),), (torch.ones(2),))
    assert found == [False, True, True]
