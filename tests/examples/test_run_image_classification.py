"""run_image_classification.py on a tiny model, and its errors."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from support.tiny import make_vision_model
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_quantnoise.runs.images import main, parse, prepare

PROCESSOR = {
    "image_processor_type": "MobileNetV1ImageProcessor",
    "size": {"shortest_edge": 40},
    "crop_size": {"height": 32, "width": 32},
}


# Adjacent blocks with weights of the same shape.
ALIKE = ["mobilenet_v2.layer.7", "mobilenet_v2.layer.8"]


def write_checkpoint(folder):
    make_vision_model("mobilenet-v2").save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "model")


def write_images(folder):
    """Write images of one of four colours; the label is the colour."""
    rng = np.random.default_rng(0)
    paths = {}
    for split, count in (("train", 24), ("validation", 16)):
        labels = rng.integers(0, 4, count)
        labels[:4] = range(4)
        images = []
        for label in labels:
            pixels = rng.integers(0, 60, (20, 24, 3)) + 60 * label
            buffer = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
            images.append(buffer.getvalue())
        paths[split] = folder / f"{split}.parquet"
        table = pa.table({"image": pa.array(images, pa.binary()), "label": labels})
        pq.write_table(table, paths[split])
    return paths


@pytest.fixture
def files(tmp_path):
    return write_images(tmp_path)


def flags(checkpoint, files, tmp_path, *more):
    stages = () if "fixed_point" in more else ("--stages", "conv")
    return [
        *("--model_name_or_path", str(checkpoint), "--train_file", str(files["train"])),
        *("--validation_file", str(files["validation"]), "--output_dir", str(tmp_path / "out")),
        *("--num_train_epochs", "1", "--save_strategy", "no", "--disable_tqdm", "True"),
        *("--plots", "False", "--metrics", "sklearn"),
        *("--per_device_train_batch_size", "8", "--n_centroids", "8", "--stage_epochs", "0.5"),
        *("--cache_dir", str(tmp_path / "cache"), *stages, *more),
    ]


@pytest.mark.parametrize(
    "settings",
    [
        ["--noise", "proxy"],
        ["--noise", "pq", "--codebook_bits", "8", "--activation_bits", "8"],
        ["--noise", "int8", "--scheme", "fixed_point", "--observer", "histogram"],
        ["--noise", "mean", "--codebook_bits", "16", "--share_layers", json.dumps([ALIKE])],
        ["--noise", "int4", "--scheme", "fixed_point", "--bits", "4", "--observer", "channel"],
    ],
)
def test_run_image_classification_finetunes_compresses_and_reloads(
    checkpoint, files, tmp_path, settings, capsys
):
    main(flags(checkpoint, files, tmp_path, *settings))
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert stored["reloaded"]["logits_bit_equal"] is True
    assert stored["examples"] == {"train": 24, "validation": 16}
    assert stored["compressed"]["bytes"] < stored["dense"]["bytes"]
    assert 0 <= stored["reloaded"]["metrics"]["accuracy"] <= 1
    assert "times smaller" in capsys.readouterr().out
    small = AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "compressed")
    assert small.config.id2label == {0: "0", 1: "1", 2: "2", 3: "3"}
    # The image processor is saved with it.
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out" / "compressed")
    pixels = processor(Image.new("RGB", (50, 40)), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    with torch.no_grad():
        assert torch.isfinite(small(pixels).logits).all()


def test_image_size(checkpoint, files, tmp_path):
    main(flags(checkpoint, files, tmp_path, "--image_size", "24", "--no_compress"))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out" / "dense")
    assert processor.crop_size["height"] == 24


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--validation_file": "x.parquet"}, "--validation_file 'x.parquet'"),
        ({"--image_column": "img"}, "--image_column 'img'.*image, label"),
        ({"--image_column": "label"}, "--image_column 'label': it is the --label_column"),
        ({"--stages": "ffn"}, "stages.*'ffn'"),
        ({"--image_size": "0"}, "--image_size 0"),
    ],
)
def test_invalid_flags_are_named(checkpoint, files, tmp_path, changed, change, words):
    given = flags(checkpoint, files, tmp_path, "--do_train", "False", "--stage_epochs", "0")
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        main(changed(given, change))


def test_files_that_are_not_parquet_are_named(checkpoint, files, tmp_path, changed):
    (tmp_path / "images.parquet").write_text("not images")
    given = flags(checkpoint, files, tmp_path)
    with pytest.raises(ValueError, match=r"--train_file .*images.parquet"):
        main(changed(given, {"--train_file": str(tmp_path / "images.parquet")}))


def test_images_that_cannot_be_decoded_are_named(checkpoint, files, tmp_path):
    rows = pq.read_table(files["validation"]).to_pydict()
    rows["image"][5] = b"not an image"
    pq.write_table(pa.table(rows), files["validation"])
    given = flags(checkpoint, files, tmp_path, "--do_train", "False", "--stage_epochs", "0")
    with pytest.raises(ValueError, match=r"--image_column 'image'.* row 5 "):
        main(given)


# ---- labels --------------------------------------------------------------------------------------

NAMES = ("red", "blue", "green", "black")  # not sorted
AS_IT_IS = ["--do_train", "False", "--stage_epochs", "0", "--no_compress"]


@pytest.fixture
def named_checkpoint(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["id2label"] = {str(i): name for i, name in enumerate(NAMES)}
    config["label2id"] = {name: i for i, name in enumerate(NAMES)}
    (checkpoint / "config.json").write_text(json.dumps(config))
    return checkpoint


def set_column(path, name, change):
    columns = pq.read_table(path).to_pydict()
    pq.write_table(pa.table({**columns, name: change(columns[name])}), path)


@pytest.mark.parametrize("named", [True, False])
def test_label_ids_of_the_checkpoint_are_kept(named_checkpoint, files, tmp_path, named):
    rows = pq.read_table(files["validation"]).to_pydict()
    if named:
        set_column(files["validation"], "label", lambda labels: [NAMES[i] for i in labels])
    values = main(flags(named_checkpoint, files, tmp_path, *AS_IT_IS))
    dense = AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "dense")
    assert dense.config.id2label == dict(enumerate(NAMES))
    processor = AutoImageProcessor.from_pretrained(named_checkpoint)
    pixels = processor(
        [Image.open(io.BytesIO(image)) for image in rows["image"]], return_tensors="pt"
    )
    with torch.no_grad():
        found = dense(**pixels).logits.argmax(-1)
    hits = (found == torch.tensor(rows["label"])).float().mean().item()
    assert values["dense"]["metrics"]["accuracy"] == pytest.approx(hits)


def test_labels_of_another_head_are_named(checkpoint, files, tmp_path):
    set_column(files["validation"], "label", lambda labels: [i % 3 for i in labels])
    with pytest.raises(ValueError, match=r"head for the 4 labels .* data has the 3 labels"):
        main(flags(checkpoint, files, tmp_path, *AS_IT_IS))


def test_labels_are_those_of_all_examples(checkpoint, files, tmp_path):
    """Also if the data is sorted by label and truncated."""
    set_column(files["train"], "label", sorted)
    args = parse(flags(checkpoint, files, tmp_path, "--max_train_samples", "2"))
    job = prepare(args)
    assert job.parts["train_dataset"]["label"][:] == [0, 0]
    assert job.model.config.id2label == {0: "0", 1: "1", 2: "2", 3: "3"}


@pytest.mark.parametrize("column", ["image", "label"])
def test_missing_values_are_named(checkpoint, files, tmp_path, column):
    set_column(files["validation"], column, lambda values: [None, *values[1:]])
    with pytest.raises(ValueError, match=rf"--validation_file .* 1 of 16 rows .*'{column}'"):
        main(flags(checkpoint, files, tmp_path, *AS_IT_IS))
