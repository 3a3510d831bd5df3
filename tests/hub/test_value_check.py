"""Values of packed layers are checked once, when they are loaded."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from support.damage import edit_tensors
from support.memory import live_bytes
from support.stacked import inputs_of, make_stacked
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from hf_quantnoise import (
    AutoQuantizedModel,
    AutoQuantizedModelForSequenceClassification,
    FixedPointConfig,
    IPQConfig,
    quantize_model,
)
from hf_quantnoise.hub import reading
from hf_quantnoise.modeling import packed_layers
from hf_quantnoise.modeling.value_check import MAX_ZERO_POINT
from hf_quantnoise.quantizers.packing import (
    PART,
    has_code_from,
    largest_code,
    pack_codes,
    unpack_codes,
)

TABLE = "bert.embeddings.word_embeddings"
LAYER = "bert.encoder.layer.1.output.dense"
CODES = {  # number of centroids -> bits per code
    "3 of 2 bits": IPQConfig(block_size=4, n_centroids=3),
    "5 of 3 bits": IPQConfig(block_size=4, n_centroids=5),
    "12 of 4 bits": IPQConfig(block_size=4, n_centroids=12, codebook_bits=8),
    "200 of 8 bits": IPQConfig(block_size=4, n_centroids=200),
    "300 of 9 bits": IPQConfig(block_size=4, n_centroids=300, stages=["embeddings"]),
    "2 x 12 of 4 bits": IPQConfig(block_size=8, n_centroids=12, n_codebooks=2),
    "2 x 50 of 6 bits": IPQConfig(block_size=4, n_centroids=50, n_codebooks=2, row_scale=True),
}
STATES = {
    "pq": IPQConfig(block_size=4, n_centroids=16, row_scale=True, codebook_bits=32),
    "16 bits": IPQConfig(block_size=4, n_centroids=16, codebook_bits=16),
    "8 bits": IPQConfig(block_size=4, n_centroids=16, codebook_bits=8),
    "additive": IPQConfig(block_size=8, n_centroids=12, n_codebooks=2, codebook_bits=8),
    "int": FixedPointConfig(bits=3, observer="channel", activation_bits=8),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for kind, config in {**CODES, **STATES}.items():
        data = [inputs_of("bert")] if config.activation_bits else None
        model = make_stacked("bert", 2)
        quantize_model(model, config, calibration_data=data, progress=False)
        model.save_pretrained(folder / kind)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return lambda kind: shutil.copytree(saved / kind, tmp_path / "folder")


@torch.no_grad()
def output(model):
    return model(**inputs_of("bert")).logits


def with_code(quantizer, count, place, code):
    """Return a function that sets one of the packed codes."""

    def change(packed):
        codes = unpack_codes(packed.reshape(-1), quantizer.code_bits, count).clone()
        codes[place] = code
        return pack_codes(codes, quantizer.code_bits).view_as(packed)

    return change


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("kind", CODES)
def test_code_beyond_the_codebook_is_refused(kind, place, folder):
    path = folder(kind)
    layer = AutoQuantizedModel.from_pretrained(path).get_submodule(TABLE)
    count, limit = layer.n_codes, layer.quantizer.n_centroids
    name = f"{TABLE}.weight_indices"

    def write(code):
        change = with_code(layer.quantizer, count, place, code)
        edit_tensors(path, lambda tensors: tensors.update({name: change(tensors[name])}))

    write(limit - 1)
    AutoQuantizedModel.from_pretrained(path)
    for code in (limit, 2**layer.quantizer.code_bits - 1):
        write(code)
        for loader in (AutoQuantizedModel, AutoModel, AutoModelForSequenceClassification):
            with pytest.raises(ValueError, match=rf"word_embeddings.*the code {code}.*{limit - 1}"):
                loader.from_pretrained(path)
        AutoQuantizedModel.from_pretrained(path, check=False)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 7, 8, 9, 12, 16])
def test_largest_code_of_any_size(bits):
    torch.manual_seed(bits)
    for count in (1, 7, 8, 100, PART, PART + 1, 2 * PART + 13):
        codes = torch.randint(0, 2**bits - 1 or 1, (count,), dtype=torch.int32)
        for place in (0, count // 2, count - 1):
            codes[place] = 2**bits - 1
            packed = pack_codes(codes, bits)
            assert largest_code(packed, bits, count) == 2**bits - 1
            assert has_code_from(packed, bits, count, 2**bits - 1)
            codes[place] = 0
        largest, packed = int(codes.max()), pack_codes(codes, bits)
        assert largest_code(packed, bits, count) == largest
        assert not has_code_from(packed, bits, count, largest + 1)
        assert has_code_from(packed, bits, count, max(largest, 1)) == (largest > 0)


def test_bits_after_the_last_code_do_not_count():
    packed = pack_codes(torch.tensor([1, 0, 1]), 2)
    packed[-1] |= 0b1100_0000
    assert not has_code_from(packed, 2, 3, 3) and largest_code(packed, 2, 3) == 1


def test_largest_code_needs_bounded_memory():
    packed = torch.zeros(3 * 2**21, dtype=torch.uint8)
    for check in (largest_code, has_code_from):
        limit = (60,) if check is has_code_from else ()
        assert live_bytes(lambda run=check, more=limit: run(packed, 6, 2**23, *more)).peak < 2**23


NAN, INF = float("nan"), float("inf")
WRONG = {
    "weight_codebook": [NAN, INF, -INF],
    "weight_row_scale": [NAN, INF, -INF],
    "weight_codebook_scale": [NAN, INF, 0.0, -1.0],
    "weight_codebook_zero_point": [NAN, INF, -2 * MAX_ZERO_POINT],
    "weight_scale": [NAN, INF, -INF],
    "weight_zero_point": [NAN, -INF, 2 * MAX_ZERO_POINT],
    "input_scale": [NAN, INF, 0.0, -1.0],
    "input_zero_point": [NAN, INF, 2 * MAX_ZERO_POINT],
}


def set_last(path, name, value):
    def change(tensors):
        tensors[name].view(-1)[-1] = value

    edit_tensors(path, change)


@pytest.mark.parametrize("kind", STATES)
def test_invalid_floats_are_refused(kind, saved, folder):
    names = [
        key for key in load_file(saved / kind / "model.safetensors") if key.startswith(f"{LAYER}.")
    ]
    tried = 0
    path = folder(kind)
    for name in names:
        for value in WRONG.get(name.rpartition(".")[2], ()):
            original = load_file(path / "model.safetensors")[name].clone()
            if original.dtype == torch.uint8 or torch.finfo(original.dtype).max < abs(value) < INF:
                continue
            set_last(path, name, value)
            for loader in (AutoQuantizedModel, AutoModel):
                with pytest.raises(ValueError, match=rf"invalid .*{name[5:]}: got"):
                    loader.from_pretrained(path)
            AutoQuantizedModel.from_pretrained(path, check=False)
            edit_tensors(path, lambda t, n=name, o=original: t.update({n: o}))
            tried += 1
    assert tried >= 2
    AutoQuantizedModel.from_pretrained(path)


def test_scale_that_training_made_negative_loads(saved, folder):
    """Adam moves a scale of 1e-4 below 0 in one step of 1e-3."""
    path = folder("int")
    set_last(path, f"{LAYER}.weight_scale", -1e-3)
    AutoQuantizedModel.from_pretrained(path)


def test_rows_of_zeros_have_a_valid_scale(tmp_path):
    model = make_stacked("bert", 2)
    model.bert.embeddings.word_embeddings.weight.data[0] = 0
    quantize_model(model, STATES["pq"], progress=False).save_pretrained(tmp_path)
    assert (load_file(tmp_path / "model.safetensors")[f"{TABLE}.weight_row_scale"] == 0).any()
    AutoQuantizedModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("way", ["direct", "transformers", "device_map", "disk", "state dict"])
def test_every_way_of_loading_checks_values(way, folder, tmp_path, monkeypatch):
    path = folder("pq")
    set_last(path, f"{LAYER}.weight_codebook", NAN)
    settings = {"device_map": {"": "cpu"}} if way == "device_map" else {}
    if way == "transformers":
        monkeypatch.setattr(reading, "_can_read", lambda *_: False)
    if way == "disk":
        places = {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "cpu",
                  "classifier": "cpu"}  # fmt: skip
        settings = {"device_map": places, "offload_folder": tmp_path / "offload"}
    if way == "state dict":
        settings = {
            "state_dict": load_file(path / "model.safetensors"),
            "config": AutoConfig.from_pretrained(path),
        }
    load = BertForSequenceClassification.from_pretrained
    with pytest.raises(ValueError, match=rf"{LAYER}.weight_codebook: got NaN"):
        load(None if way == "state dict" else path, **settings)
    if way != "state dict":
        load = AutoQuantizedModelForSequenceClassification.from_pretrained
        assert output(load(path, **settings, check=False)).isnan().any()


@pytest.mark.parametrize(
    ("kind", "name", "dtype"),
    [(kind, "weight_indices", dtype) for kind in ("pq", "int", "3 of 2 bits")
     for dtype in (torch.int8, torch.int16, torch.int64, torch.bool, torch.float8_e4m3fn,
                   torch.float32)]
    + [("pq", name, dtype) for name in ("weight_codebook", "weight_row_scale")
       for dtype in (torch.uint8, torch.int32, torch.bool, torch.float8_e5m2)]
    + [("8 bits", "weight_codebook", dtype)
       for dtype in (torch.int8, torch.float32, torch.float16, torch.int16)]
    + [("int", name, torch.int32) for name in ("weight_scale", "input_scale")],
)  # fmt: skip
def test_tensor_of_another_dtype_is_refused(kind, name, dtype, folder):
    path = folder(kind)
    full = f"{LAYER}.{name}"
    edit_tensors(path, lambda tensors: tensors.update({full: tensors[full].to(dtype)}))
    for settings in ({}, {"check": False}, {"device_map": "auto"}):
        with pytest.raises(ValueError, match=rf"invalid dtype .* of {full}"):
            AutoQuantizedModel.from_pretrained(path, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_floats_may_have_any_precision(dtype, folder):
    path = folder("pq")
    expected = output(AutoQuantizedModel.from_pretrained(path))
    full = f"{LAYER}.weight_codebook"
    edit_tensors(path, lambda tensors: tensors.update({full: tensors[full].to(dtype)}))
    found = output(AutoQuantizedModel.from_pretrained(path))
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)


def test_values_too_large_for_the_precision_are_refused(folder):
    path = folder("pq")
    set_last(path, f"{LAYER}.weight_codebook", 70_000.0)
    AutoQuantizedModel.from_pretrained(path)
    with pytest.raises(ValueError, match=rf"{LAYER}.weight_codebook: .*infinite.*float16"):
        AutoQuantizedModel.from_pretrained(path, dtype=torch.float16)


# ---- state dicts and checkpoints of Trainer ------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [("pq", "weight_codebook", NAN), ("int", "weight_scale", NAN),
     ("8 bits", "weight_codebook_scale", NAN)],
)  # fmt: skip
def test_load_state_dict_refuses_invalid_values(kind, name, value, saved):
    model = AutoQuantizedModel.from_pretrained(saved / kind)
    expected = output(model)
    stored = {key: t.clone() for key, t in load_file(saved / kind / "model.safetensors").items()}
    stored[f"{LAYER}.{name}"].view(-1)[-1] = value
    with pytest.raises(RuntimeError, match=rf"invalid {LAYER}\.{name}"):
        model.load_state_dict(stored, strict=False)
    assert torch.equal(output(model), expected)


@pytest.mark.parametrize("dtype", [torch.int16, torch.float32])
def test_load_state_dict_refuses_codes_of_another_dtype(dtype, saved):
    model = AutoQuantizedModel.from_pretrained(saved / "pq")
    name = f"{LAYER}.weight_indices"
    with pytest.raises(RuntimeError, match=rf"invalid {name}: got {dtype}"):
        model.load_state_dict({name: model.state_dict()[name].to(dtype)}, strict=False)


def test_trainer_refuses_a_damaged_checkpoint(folder, parity_data, tmp_path):
    path = folder("12 of 4 bits")
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=2, save_steps=1, use_cpu=True,
        disable_tqdm=True, per_device_train_batch_size=4, report_to="none",
    )  # fmt: skip
    model = AutoQuantizedModel.from_pretrained(path)
    Trainer(model, arguments, train_dataset=parity_data).train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    name = next(name for name, _ in packed_layers(model)) + ".weight_indices"
    edit_tensors(checkpoint, lambda tensors: tensors[name].fill_(255))
    with pytest.raises(RuntimeError, match=rf"invalid {name}: got the code 15"):
        Trainer(model, arguments, train_dataset=parity_data).train(
            resume_from_checkpoint=str(checkpoint)
        )
