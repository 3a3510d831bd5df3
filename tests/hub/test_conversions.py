"""Models whose checkpoints transformers renames or converts: every type in its mapping."""

import copy
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file
from support.conversions import build_tiny, classes_in_mapping

from hf_quantnoise import FixedPointConfig, IPQConfig, quantize_model, size_report
from hf_quantnoise.modeling import packed_layers
from hf_quantnoise.modeling.packed import PREFIX
from hf_quantnoise.structure import find_layers

FILE = "model.safetensors"
PQ = {"scheme": "pq", "block_size": 4, "n_centroids": 4}
CYCLES = {
    "ipq": [PQ],
    "codebook in 8 bits": [{**PQ, "codebook_bits": 8}],
    "mixed": [PQ, {"scheme": "int", "bits": 4}, {**PQ, "row_scale": True}, {**PQ, "block_size": 8}],
    "one dense": [PQ, PQ, {"scheme": "dense"}],
}
CASES = [*CYCLES, "fixed point"]
# Model types whose conversions differ in kind: fused, split, transposed, renamed, scoped.
FEW = ["NomicBertModel", "Dinov2Model", "MixtralForCausalLM", "NemotronHForCausalLM"]


def config_of(model, case):
    """Return a config for a case that every layer fits; consecutive layers differ in "mixed"."""
    layers = find_layers(model)
    fitting = [layer for layer in layers if layer.rows * layer.columns >= 256]
    fitting = [layer for layer in fitting if layer.columns % 8 == 0 and not layer.ties]
    if case == "fixed point":
        return FixedPointConfig(target_modules=[layer.name for layer in fitting])
    cycle = CYCLES[case]
    by_name = {layer.name: {"scheme": "dense"} for layer in layers}
    by_name |= {layer.name: cycle[i % len(cycle)] for i, layer in enumerate(fitting)}
    # Weights that a class does not initialise may be too small for float16.
    stages = sorted({layer.group for layer in layers})
    return IPQConfig(layer_quantizers=by_name, stages=stages, codebook_bits=32)


def state_of(model):
    """Return the tensors that a model computes with: codes, decoded weights, dense tensors."""
    state = {n: t.clone() for n, t in model.state_dict().items() if not t.is_floating_point()}
    packed = dict(packed_layers(model))
    state |= {f"{name}.weight": layer.decode().detach() for name, layer in packed.items()}
    for name, tensor in model.state_dict().items():
        layer, _, key = name.rpartition(".")
        if layer not in packed or not key.startswith(PREFIX):
            state[name] = tensor.clone()
    return state


def assert_survives_saving(model, folder):
    """Save and load a packed model: all tensors are equal, under the same names."""
    before, names = state_of(model), [name for name, _ in packed_layers(model)]
    assert names
    model.save_pretrained(folder)
    again, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert [name for name, _ in packed_layers(again)] == names
    after = state_of(again)
    assert before.keys() == after.keys()
    unequal = [name for name in before if not torch.equal(before[name], after[name])]
    assert not unequal
    return again


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FEW)
def test_converted_model_survives_saving(tmp_path, name, case):
    model = build_tiny(name)
    quantize_model(model, config_of(model, case), progress=False)
    size = size_report(model).total.disk_bytes
    again = assert_survives_saving(model, tmp_path / "1")
    again.save_pretrained(tmp_path / "2")
    files = [tmp_path / number / FILE for number in "12"]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].stat().st_size == size


def test_target_size_of_model_with_fused_layers(tmp_path):
    model = build_tiny("NomicBertModel")
    quantize_model(model, IPQConfig(target_bits_per_weight=6), progress=False)
    assert_survives_saving(model, tmp_path)


def test_dequantized_model_has_the_file_of_a_dense_one(tmp_path):
    build_tiny("NomicBertModel").save_pretrained(tmp_path / "dense")
    model = type(build_tiny("NomicBertModel")).from_pretrained(tmp_path / "dense")
    quantize_model(model, config_of(model, "one dense"), progress=False)
    model.save_pretrained(tmp_path / "packed")
    model.dequantize().save_pretrained(tmp_path / "again")
    dense, again = (load_file(tmp_path / name / FILE) for name in ("dense", "again"))
    assert dense.keys() == again.keys() and any("Wqkv" in name for name in dense)
    assert all(dense[name].shape == again[name].shape for name in dense)


def test_saved_model_can_be_copied_and_pickled(tmp_path):
    model = build_tiny("NomicBertModel")
    quantize_model(model, config_of(model, "mixed"), progress=False)
    model.save_pretrained(tmp_path / "1")
    for number, made in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        made.save_pretrained(tmp_path / f"copy-{number}")
        saved = (tmp_path / f"copy-{number}" / FILE).read_bytes()
        assert saved == (tmp_path / "1" / FILE).read_bytes()


@pytest.mark.slow
def test_all_converted_model_types_survive_saving(tmp_path):
    """Walk transformers' conversion mapping: each class of each type that can be built.

    Each class is saved in one of the cases, in turn by name, so that the classes of a family take
    different ones and the walk lasts minutes.
    """
    keys = classes_in_mapping()
    unbuilt, saved, failed = {}, [], {}
    for number, name in enumerate(sorted({name for names in keys.values() for name in names})):
        case = CASES[number % len(CASES)]
        try:
            model = build_tiny(name)
        except Exception as error:  # its config needs more than small sizes
            unbuilt[name] = f"{type(error).__name__}: {error}"
            continue
        try:
            quantize_model(model, config_of(model, case), progress=False)
            assert_survives_saving(model, tmp_path / name)
            saved.append((name, case))
        except Exception as error:
            failed[name, case] = f"{type(error).__name__}: {error}"
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    built = {name for name, _ in saved}
    of_keys = sum(not built.isdisjoint(names) for names in keys.values())
    print(
        f"{len(keys)} keys, {of_keys} of them with a class that was built; {len(built)} classes "
        f"built, {len(unbuilt)} not; {len(saved)} models saved and loaded, {len(failed)} failed"
    )
    assert not failed
    assert of_keys > 0.7 * len(keys) and len(built) > 250
