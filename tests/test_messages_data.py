"""Error messages for wrong calibration data, folders, files, names of repositories and cards."""

from functools import partial

import pytest
import torch
from support.mistakes import SMALL, Mistake, check_message, quantize
from support.tiny import make_model
from torch.utils.data import DataLoader, TensorDataset

from hf_quantnoise import (
    AutoQuantizedModel,
    FixedPointConfig,
    IPQConfig,
    QuantNoiseConfig,
    allocate_bits,
    export_aqlm,
    export_onnx,
    push_to_hub,
    write_model_card,
)

TARGET = IPQConfig(target_size_mb=0.05)
IDS = torch.arange(5)[None]

# ---- calibration data ----------------------------------------------------------------------------


def exhausted():
    batches = ({"input_ids": ids} for ids in [IDS])
    list(batches)
    return batches


# Data -> how it is made, field and value.
NOT_BATCHES = {
    "one dict": (lambda: {"input_ids": IDS}, "", "dict"),
    "a tensor": (lambda: IDS, "", "Tensor"),
    "a text": (lambda: "a text", "", "'a text'"),
    "a number": (lambda: 3, "", "3"),
    "texts": (lambda: ["a text"], "[0]", "'a text'"),
    "tensors": (lambda: [IDS], "[0]", "Tensor"),
    "tuples": (lambda: [(IDS, IDS)], "[0]", "tuple"),
    "lists": (lambda: [[1, 2]], "[0]", "[1, 2]"),
    "None": (lambda: [{"input_ids": IDS}, None], "[1]", "None"),
    "a DataLoader of tuples": (lambda: DataLoader(TensorDataset(IDS)), "[0]", "list"),
    "an exhausted generator": (exhausted, "", "generator"),
    "dicts of lists": (lambda: [{"input_ids": [1, 2]}], "[0]", "{'input_ids': [1, 2]}"),
    "dicts of texts": (lambda: [{"text": "a"}], "[0]", "{'text': 'a'}"),
    "empty dicts": (lambda: [{}], "[0]", "{}"),
    "rows without batch dimension": (lambda: [{"input_ids": IDS[0]}], "", "(5,)"),
    "unknown inputs": (lambda: [{"pixels": IDS}], "", "pixels (1, 5)"),
    "ids beyond the vocabulary": (lambda: [{"input_ids": IDS + 5000}], "", "input_ids (1, 5)"),
    "ids that are floats": (lambda: [{"input_ids": IDS.float()}], "", "input_ids (1, 5)"),
}
READING = {
    "activation_bits": FixedPointConfig(activation_bits=8),
    "importance": IPQConfig(block_size=4, n_centroids=16, importance="activations"),
}


@pytest.mark.parametrize("config", READING)
@pytest.mark.parametrize("kind", NOT_BATCHES)
def test_calibration_data_that_is_not_a_list_of_batches(kind, config, tmp_path):
    make, index, value = NOT_BATCHES[kind]
    model = make_model("bert")
    mistake = Mistake(
        lambda folder: quantize(READING[config], model, calibration_data=make()),
        f"calibration_data{index}",
        value,
    )
    check_message(mistake, tmp_path)
    assert not getattr(model, "is_quantized", False)


@pytest.mark.parametrize("kind", NOT_BATCHES)
def test_batches_of_allocate_bits(kind, tmp_path):
    make, index, value = NOT_BATCHES[kind]
    call = partial(allocate_bits, make_model("bert"), TARGET, progress=False)
    check_message(Mistake(lambda folder: call(make()), f"batches{index}", value), tmp_path)


def test_unused_calibration_data_is_a_warning(caplog):
    quantize(SMALL, calibration_data=[{"input_ids": IDS}])
    assert "calibration_data is not used" in caplog.text


# ---- folders, names and cards --------------------------------------------------------------------


def file_in(folder, content="{", name="file.json"):
    (folder / name).write_text(content)
    return folder / name


def load_config_that_is_not_json(folder):
    file_in(folder, name="config.json")
    AutoQuantizedModel.from_pretrained(folder)


def packed():
    return quantize(SMALL)


LOADERS = {
    AutoQuantizedModel: "pretrained_model_name_or_path",
    IPQConfig: "path",
    QuantNoiseConfig: "path",
}
MISTAKES = {
    **{
        f"{kind.__name__} {what}": Mistake(
            lambda folder, kind=kind, make=make: kind.from_pretrained(make(folder)), field, value
        )
        for kind, path in LOADERS.items()
        for what, make, field, value in (
            ("of None", lambda folder: None, path, "None"),
            ("of a number", lambda folder: 3, path, "3"),
            (
                "of a model",
                lambda folder: make_model("bert"),
                path,
                "BertForSequenceClassification",
            ),
            ("of a missing folder", lambda folder: folder / "absent", "folder", "out/absent"),
            ("of a relative missing folder", lambda folder: "./absent", "folder", "'./absent'"),
            ("of an empty name", lambda folder: "", "folder", "''"),
            ("of an invalid name", lambda folder: "a b c", "folder", "'a b c'"),
            ("of a missing repository", lambda folder: "me/absent", "folder", "me/absent"),
            ("of an empty folder", lambda folder: folder, "missing", "out"),
            ("of a file that is not JSON", file_in, "file.json", "out/file.json"),
        )
    },
    "config.json that is not JSON": Mistake(
        lambda folder: AutoQuantizedModel.from_pretrained(
            file_in(folder, name="config.json").parent
        ),
        "config.json",
        "out",
    ),
    "JSON that is not a config": Mistake(
        lambda folder: IPQConfig.from_pretrained(file_in(folder, "[1]")),
        "file.json",
        "out/file.json",
    ),
    "save a config in None": Mistake(
        lambda folder: SMALL.save_pretrained(None), "save_directory", "None"
    ),
    "save a config in a file": Mistake(
        lambda folder: SMALL.save_pretrained(file_in(folder)), "save_directory", "'out/file.json'"
    ),
    "push to a number": Mistake(lambda folder: push_to_hub(packed(), 3), "repo_id", "3"),
    "push to None": Mistake(lambda folder: push_to_hub(packed(), None), "repo_id", "None"),
    "push to an invalid name": Mistake(
        lambda folder: push_to_hub(packed(), "my models/small"), "repo_id", "'my models/small'"
    ),
    "push with model and name swapped": Mistake(
        lambda folder: push_to_hub("me/small", packed()), "model", "'me/small'"
    ),
    "push a config to a number": Mistake(lambda folder: SMALL.push_to_hub(3), "repo_id", "3"),
    "push with a text as card": Mistake(
        lambda folder: push_to_hub(packed(), "me/small", card="good"), "card", "'good'"
    ),
    "card in None": Mistake(lambda folder: write_model_card(packed(), None), "folder", "None"),
    "export to AQLM in None": Mistake(lambda folder: export_aqlm(packed(), None), "folder", "None"),
    "export to AQLM in a file": Mistake(
        lambda folder: export_aqlm(packed(), file_in(folder)), "folder", "'out/file.json'"
    ),
    "export to ONNX in a number": Mistake(lambda folder: export_onnx(packed(), 5), "folder", "5"),
    "export to ONNX in a file": Mistake(
        lambda folder: export_onnx(packed(), file_in(folder)), "folder", "'out/file.json'"
    ),
    "ONNX inputs in a list": Mistake(
        lambda folder: export_onnx(packed(), folder, inputs=[IDS]), "inputs", "list"
    ),
    "ONNX inputs without tensors": Mistake(
        lambda folder: export_onnx(packed(), folder, inputs={"input_ids": [1]}),
        "inputs",
        "{'input_ids': [1]}",
    ),
    "ONNX of an unknown dtype": Mistake(
        lambda folder: export_onnx(packed(), folder, dtype="q4"), "dtype", "'q4'"
    ),
    "ONNX with leftovers of 8 bits": Mistake(
        lambda folder: export_onnx(packed(), folder, leftover_bits=8), "leftover_bits", "8"
    ),
    "ONNX inputs of another model": Mistake(
        lambda folder: export_onnx(packed(), folder, inputs={"pixels": IDS}),
        "inputs",
        "pixels (1, 5)",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_message_names_field_value_and_way_out(name, tmp_path):
    if name == "ONNX inputs of another model":  # found by running it
        pytest.importorskip("onnx", reason="needs the extra 'onnx'")
    check_message(MISTAKES[name], tmp_path)
