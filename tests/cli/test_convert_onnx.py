"""``convert --to onnx``: same outputs as the packed model, and useful messages only."""

import logging
import subprocess
import sys
import warnings

import pytest
import torch
from support.stacked import make_stacked

from hf_quantnoise import AutoQuantizedModel, IPQConfig, quantize_model
from hf_quantnoise.export.onnx_file import _EXPORTER_LOGGER, _quiet_exporter

pytest.importorskip("onnx", reason="needs the extra 'onnx'")
pytest.importorskip("onnxscript", reason="needs the extra 'onnx'")


@pytest.mark.slow
def test_onnx_model_has_the_outputs_of_the_packed_model(work, input_ids):
    """In a subprocess: the exporter's log bypasses pytest's capture of stderr."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "hf_quantnoise",
            "convert",
            "out/compressed",
            "out/onnx",
            "--to",
            "onnx",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    size = (work / "out" / "onnx" / "onnx" / "model.onnx").stat().st_size / 1e6
    file = f"out/onnx/onnx/model.onnx ({size:.3f} MB)"
    assert done.stdout == f"out/compressed written as 'onnx' to {file}\n"
    for words in ("Warning", "torchvision", "axis name", "hf_quantnoise/"):
        assert words not in done.stderr
    folder = work / "out" / "onnx"
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "onnx", "tokenizer_config.json",
    ]  # fmt: skip
    model = AutoQuantizedModel.from_pretrained(work / "out" / "compressed")
    inputs = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "token_type_ids": torch.zeros_like(input_ids),
    }
    session = onnxruntime.InferenceSession(str(folder / "onnx" / "model.onnx"))
    (found,) = session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.std() > 1e-2  # or the tolerance below would accept anything
    torch.testing.assert_close(torch.from_numpy(found), logits, rtol=0, atol=1e-4)
    dense = (work / "out" / "dense" / "model.safetensors").stat().st_size
    assert (folder / "onnx" / "model.onnx").stat().st_size < dense


def test_encoder_decoders_are_refused_without_output(tmp_path, run):
    model = quantize_model(make_stacked("t5", 1), IPQConfig(n_centroids=16), progress=False)
    model.save_pretrained(tmp_path / "packed")
    code, out, err = run(f"convert {tmp_path}/packed {tmp_path}/onnx --to onnx")
    lines = [line for line in err.splitlines() if "error: " in line]
    assert code == 1 and out == "" and "Traceback" not in err
    assert len(lines) == 1 and "T5ForConditionalGeneration" in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_only_irrelevant_warnings_are_suppressed():
    logger, messages = logging.getLogger(_EXPORTER_LOGGER), []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    idle = "torchvision is not installed. Skipping torchvision::nms"
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with _quiet_exporter():
                warnings.warn(
                    "# The axis name: sequence_length will not be used, since", stacklevel=1
                )
                warnings.warn("# The axis name: other will not be used, since", stacklevel=1)
                logger.warning(idle)
                logger.warning("an operator has no translation")
            logger.warning(idle)
    finally:
        logger.removeHandler(handler)
    assert [str(one.message)[:22] for one in caught] == ["# The axis name: other"]
    assert messages == ["an operator has no translation", idle]


def test_overwrite_removes_the_graph_of_the_old_model(work, run):
    old = work / "out" / "onnx"
    (old / "onnx").mkdir(parents=True)
    for path in (old / "config.json", old / "onnx" / "model.onnx"):
        path.write_text('{"model_type": "bert"}')
    code, _, err = run("convert out/compressed out/onnx --to onnx_int8 --overwrite")
    assert code == 0, err
    assert [path.name for path in (old / "onnx").iterdir()] == ["model_int8.onnx"]
