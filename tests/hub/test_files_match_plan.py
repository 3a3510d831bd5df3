"""Packed tensors in the files and entries of the plan belong together, or loading raises."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from support.damage import edit_config, edit_tensors
from support.stacked import inputs_of, make_stacked
from support.stored import PQ
from support.tiny import make_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertModel,
)

from hf_quantnoise import AutoQuantizedModel, FixedPointConfig, IPQConfig, quantize_model
from hf_quantnoise.cli import main
from hf_quantnoise.hub.skeleton import SHAPES_ARE_CHECKED
from hf_quantnoise.modeling import packed_layers

LAYER = "bert.encoder.layer.1.output.dense"
OTHER = "bert.encoder.layer.0.output.dense"
KINDS = {
    "pq": IPQConfig(**PQ),
    "8 bits, rows": IPQConfig(**PQ, codebook_bits=8, row_scale=True),
    "additive": IPQConfig(block_size=8, n_centroids=8, n_codebooks=2),
    "int": FixedPointConfig(bits=3, observer="channel"),
    "inputs": FixedPointConfig(bits=8, activation_bits=8),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for kind, config in KINDS.items():
        data = [inputs_of("bert")] if config.activation_bits else None
        model = quantize_model(
            make_stacked("bert", 2), config, calibration_data=data, progress=False
        )
        model.save_pretrained(folder / kind)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return lambda kind: shutil.copytree(saved / kind, tmp_path / "folder")


def entry(change):
    """Return a damage that changes the plan."""
    return lambda folder: edit_config(folder, lambda stored: change(stored["plan"]))


def tensors(change):
    """Return a damage that changes the tensors of the file."""
    return lambda folder: edit_tensors(folder, change)


def rename(one, other):
    return lambda values: values.update({other: values.pop(one)})


def stray(name, like="weight_indices"):
    return tensors(lambda t: t.update({name: t[f"{LAYER}.{like}"].clone()}))


DAMAGES = {
    "entry deleted": entry(lambda plan: plan.pop(LAYER)),
    "entry renamed to no layer": entry(rename(LAYER, "bert.encoder.layer.7.output.dense")),
    "entry renamed to a dense layer": entry(rename(LAYER, "bert.encoder.layer.1.output.LayerNorm")),
    "entry moved to another layer": entry(rename(LAYER, "bert.encoder.layer.1.output")),
    "entry of no layer": entry(lambda plan: plan.update({LAYER + "s": plan[LAYER]})),
    "rows": entry(lambda plan: plan[LAYER].update(rows=64)),
    "columns": entry(lambda plan: plan[LAYER].update(columns=32)),
    "rows and columns": entry(lambda plan: plan[LAYER].update(rows=64, columns=32)),
    "rows of all": entry(
        lambda plan: [e.update(rows=2 * e["rows"]) for name, e in plan.items() if "encoder" in name]
    ),
    "activation_bits": entry(
        lambda plan: (
            plan[LAYER].pop("activation_bits")
            if "activation_bits" in plan[LAYER]
            else plan[LAYER].update(activation_bits=8)
        )
    ),
    "codes deleted": tensors(lambda t: t.pop(f"{LAYER}.weight_indices")),
    "codes renamed": tensors(rename(f"{LAYER}.weight_indices", f"{LAYER}s.weight_indices")),
    "codes of no layer": stray("bert.encoder.layer.7.output.dense.weight_indices"),
    "codes of a dense layer": stray("bert.encoder.layer.1.output.LayerNorm.weight_indices"),
    "dense weight": tensors(lambda t: t.update({f"{OTHER}.weight": torch.zeros(32, 64)})),
    "flat codes": tensors(
        lambda t: t.update({f"{LAYER}.weight_indices": t[f"{LAYER}.weight_indices"][None]})
    ),
    "codes of another size": tensors(
        lambda t: t.update({f"{LAYER}.weight_indices": t[f"{LAYER}.weight_indices"][:-1]})
    ),
}
STRAY = ["weight_row_scale", "weight_codebook", "weight_codebook_scale", "weight_scale",
         "weight_zero_point", "input_scale", "input_zero_point"]  # fmt: skip
DAMAGES |= {f"stray {name}": stray(f"{LAYER}.{name}") for name in STRAY}
OF_OTHER_SETTINGS = [
    ("pq", "n_centroids", 8), ("pq", "block_size", 8), ("pq", "row_scale", True),
    ("pq", "codebook_bits", 8), ("8 bits, rows", "codebook_bits", 16),
    ("8 bits, rows", "row_scale", False), ("additive", "scheme", "pq"),
    ("pq", "scheme", "additive"), ("additive", "n_centroids", 16), ("int", "bits", 4),
    ("int", "observer", "minmax"),
]  # fmt: skip


LOADERS = (AutoQuantizedModel, AutoModelForSequenceClassification, AutoModel)


def require_error(folder, words=("encoder.layer",), loaders=LOADERS, **settings):
    """Check that every loader raises an error with these words."""
    for loader in loaders:
        with pytest.raises(ValueError) as error:
            loader.from_pretrained(folder, **settings)
        for word in words:
            assert word in str(error.value), (loader, str(error.value))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_files_and_plan_that_differ_are_refused(kind, damage, folder):
    place = folder(kind)
    DAMAGES[damage](place)
    # A class without a head cannot know whether a layer that it lacks is in another part.
    require_error(place, loaders=LOADERS[:2] if "no layer" in damage else LOADERS)


@pytest.mark.parametrize("damage", ["entry deleted", "rows and columns", "stray weight_row_scale"])
def test_files_and_plan_are_compared_by_every_reading_path(damage, folder):
    place = folder("pq")
    DAMAGES[damage](place)
    require_error(place, device_map="auto")
    require_error(place, device_map={"": "cpu"})
    require_error(place, key_mapping={"x": "y"})


@pytest.mark.parametrize(("kind", "field", "value"), OF_OTHER_SETTINGS)
def test_settings_that_do_not_fit_the_tensors_are_named(kind, field, value, folder):
    place = folder(kind)
    edit_config(place, lambda stored: stored["plan"][LAYER].update({field: value}))
    missing = (kind, field) == ("pq", "row_scale")
    require_error(place, (LAYER[5:],) if missing else (LAYER[5:], f"{field}={value!r}"))


def test_report_compares_the_plan_with_the_headers(folder, capsys):
    place = folder("pq")
    assert main(["report", str(place)]) == 0
    DAMAGES["entry deleted"](place)
    capsys.readouterr()
    assert main(["report", str(place)]) == 1
    out, err = capsys.readouterr()
    assert not out and LAYER in err and "no entry" in err


@pytest.mark.parametrize("kind", ["pq", "int"])
def test_sharded_files_are_compared(kind, folder, tmp_path):
    place = tmp_path / "shards"
    AutoQuantizedModel.from_pretrained(folder(kind)).save_pretrained(place, max_shard_size="8KB")
    assert len(list(place.glob("*.safetensors"))) > 1
    AutoQuantizedModel.from_pretrained(place)
    edit_config(place, lambda stored: stored["plan"].pop(LAYER))
    require_error(place)


def test_tensor_in_two_shards_is_refused(folder, tmp_path):
    place = tmp_path / "shards"
    AutoQuantizedModel.from_pretrained(folder("pq")).save_pretrained(place, max_shard_size="8KB")
    one, other = sorted(place.glob("*.safetensors"))[:2]
    name = next(iter(load_file(one)))
    edit_tensors(place, lambda t: t.update({name: load_file(one)[name]}), other.name)
    require_error(place, (name, other.name, "another file"))


def test_other_file_formats_are_refused(folder):
    place = folder("pq")
    torch.save(load_file(place / "model.safetensors"), place / "pytorch_model.bin")
    (place / "model.safetensors").unlink()
    require_error(place, ("pytorch_model.bin", "safetensors"))


# ---- ties and shared layers ----------------------------------------------------------------------


@pytest.fixture
def tied(tmp_path):
    quantize_model(make_model("gpt2"), KINDS["pq"], progress=False).save_pretrained(tmp_path)
    return tmp_path


def test_tied_layers_with_different_settings_are_refused(tied):
    def change(stored):
        del stored["plan"]["lm_head"]["tied_to"]
        stored["plan"]["lm_head"]["block_size"] = 8

    edit_config(tied, change)
    with pytest.raises(ValueError, match=r"lm_head"):
        AutoModelForCausalLM.from_pretrained(tied)


def test_either_tied_entry_may_be_missing(tied):
    """The class ties the layers whatever is in the plan."""
    ids = torch.arange(5)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tied)(ids).logits
        edit_config(tied, lambda stored: stored["plan"].pop("lm_head"))
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tied)(ids).logits, expected)


@pytest.fixture
def shared(tmp_path):
    config = IPQConfig(**PQ, share_layers=2)
    quantize_model(make_stacked("bert", 4), config, progress=False).save_pretrained(tmp_path)
    return tmp_path


SHARED = "bert.encoder.layer.1"
WRONG_SHARED = {
    "unknown source": lambda layers: layers.update({SHARED: "bert.encoder.layer.9"}),
    "itself": lambda layers: layers.update({SHARED: SHARED}),
    "a shared source": lambda layers: layers.update({SHARED: "bert.encoder.layer.3"}),
    "another class": lambda layers: layers.update({SHARED: "bert.embeddings"}),
    "another shape": lambda layers: layers.update(
        {"bert.embeddings.word_embeddings": "bert.embeddings.position_embeddings"}
    ),
    "a parameter": lambda layers: layers.update({SHARED: "bert.embeddings.LayerNorm.weight"}),
    "removed": lambda layers: layers.pop(SHARED),
}


@pytest.mark.parametrize("damage", WRONG_SHARED)
def test_wrong_shared_layers_are_refused(damage, shared):
    AutoQuantizedModel.from_pretrained(shared)
    edit_config(shared, lambda stored: WRONG_SHARED[damage](stored["shared_layers"]))
    require_error(shared, ("shared_layers",) if damage != "removed" else ("layer.1",))


def test_shared_layers_with_different_settings_are_refused(shared):
    name = f"{SHARED}.output.dense"

    def change(stored):
        stored["plan"][name].pop("tied_to", None)
        stored["plan"][name]["block_size"] = 8

    edit_config(shared, change)
    require_error(shared, (name[5:], "different settings"))


# ---- what stays possible -------------------------------------------------------------------------


@torch.no_grad()
def output(model):
    return model(input_ids=inputs_of("bert")["input_ids"])[0]


@pytest.mark.parametrize("kind", ["pq", "int"])  # with a dense head, and with a packed one
def test_parts_of_a_checkpoint_still_load(kind, folder, tmp_path):
    place = folder(kind)
    expected = output(AutoModel.from_pretrained(place))
    assert torch.equal(output(BertModel.from_pretrained(place, add_pooling_layer=False)), expected)
    short = AutoQuantizedModel.from_pretrained(place, num_hidden_layers=1)
    assert len(short.bert.encoder.layer) == 1
    assert AutoModelForTokenClassification.from_pretrained(place).is_quantized
    AutoModel.from_pretrained(place).save_pretrained(tmp_path / "encoder")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "encoder")
    assert torch.equal(output(again.bert), expected)
    again = AutoModel.from_pretrained(tmp_path / "encoder", add_pooling_layer=False)
    assert torch.equal(output(again), expected)


@pytest.mark.parametrize("field", ["vocab_size", "intermediate_size"])
def test_layers_of_another_size_raise_as_dense_ones(field, folder):
    """Unless ``ignore_mismatched_sizes`` is passed; they are initialised then."""
    place = folder("pq")
    load = AutoModelForSequenceClassification.from_pretrained
    with pytest.raises((RuntimeError, ValueError), match="mismatch"):
        load(place, **{field: 40})
    if not SHAPES_ARE_CHECKED:
        return
    model = load(place, **{field: 40}, ignore_mismatched_sizes=True)
    left = [name for name, reason in model.config.quantization_config.left_dense.items()
            if "initialised" in reason]  # fmt: skip
    assert left and not any(name in left for name, _ in packed_layers(model))
    assert not any(name.endswith("weight_indices") and name[:-15] in left
                   for name, _ in model.named_parameters())  # fmt: skip
    assert output(model).isfinite().all() if field == "intermediate_size" else True
